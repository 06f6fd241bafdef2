"""The command `dscoder <verb>`: finds the verb, parses its arguments, turns errors into one line."""

import sys
from collections.abc import Callable, Sequence

from dscoder import __version__
from dscoder.cli import (
    bench,
    demo,
    generate,
    grpo,
    infill,
    info,
    plan,
    prefer,
    prepare,
    pretrain,
    reward_model,
    rollouts,
    sft,
    tokenizer,
)
from dscoder.cli.arguments import check_files, spelled
from dscoder.runtime.mesh import launched_rank, launched_ranks
from dscoder.train.run import StoppedError

Verb = Callable[[Sequence[str]], None]

# Every verb module offers `main(argv)`, whose docstring's first line is the help text here.
VERBS: dict[str, Verb] = {
    "demo": demo.main,
    "tokenizer": tokenizer.main,
    "prepare": prepare.main,
    "pretrain": pretrain.main,
    "sft": sft.main,
    "prefer": prefer.main,
    "reward-model": reward_model.main,
    "grpo": grpo.main,
    "rollouts": rollouts.main,
    "generate": generate.main,
    "infill": infill.main,
    "plan": plan.main,
    "bench": bench.main,
    "info": info.main,
}


def _usage() -> str:
    width = max((len(name) for name in VERBS), default=0)
    lines = [f"  {name:<{width}}  {(verb.__doc__ or '').splitlines()[0]}" for name, verb in VERBS.items()]
    return "\n".join(
        [
            f"dscoder {__version__}",
            "usage: dscoder <verb> [--config run.yaml] [--section.key value ...]",
            "",
            *lines,
            "",
            "dscoder <verb> --help tells more.",
        ]
    )


def _speaker(verb: str) -> str:
    """Who says an error: the verb and, under torchrun, the rank."""
    try:
        rank = f" [rank {launched_rank()}]" if launched_ranks() > 1 else ""
    except ValueError:  # this is what may have gone wrong
        rank = ""
    return f"dscoder {verb}{rank}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit status.

    0 done, 1 failed, 2 wrong arguments, 128 + n stopped by signal n after a checkpoint. Under torchrun every
    rank says its own error; that all of them stopped is said by the first.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(_usage())
        return 0 if words else 2
    name, *rest = words
    if name == "--version":
        print(__version__)
        return 0
    if name not in VERBS:
        print(f"dscoder: no verb {name!r}; there are {', '.join(VERBS)}", file=sys.stderr)
        return 2
    rest = spelled(rest)
    try:
        check_files(rest)
        VERBS[name](rest)
    except StoppedError as stop:
        if launched_rank() == 0:
            sys.stderr.write(f"dscoder {name}: {stop}\n")
        return 128 + stop.signal_number
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        # In one piece: print writes the end of the line by itself, and other ranks may come between.
        sys.stderr.write(f"{_speaker(name)}: {error}\n")
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
