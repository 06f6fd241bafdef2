"""The verb `dscoder pretrain`."""

import functools
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dscoder.cli.arguments import parse, shortcut
from dscoder.config import ModelConfig, preset
from dscoder.config.train import PretrainConfig, ProfileConfig
from dscoder.data.prepare import HELD_OUT
from dscoder.eval.perplexity import held_out_report
from dscoder.runtime import log
from dscoder.runtime.mesh import launched_rank
from dscoder.train import pretrain
from dscoder.train.recipes import recipe

_PROFILE = "--profile"  # alone; with --profile.start and --profile.steps, or without
_SHORTCUTS = {
    "recipe": "one of a paper's runs, to start from (see docs/pretrain.md)",
    "model.preset": "one of the published or tiny models, to start from",
}


def parse_config(argv: Sequence[str]) -> PretrainConfig:
    """The config that the words describe: a recipe's and a preset's fields, then what is given."""
    start: dict[str, object] = {}
    if _PROFILE in argv:
        start["profile"] = ProfileConfig()
        argv = [word for word in argv if word != _PROFILE]
    if (recipe_name := shortcut(argv, "recipe")) is not None:
        start |= recipe(recipe_name).fields()
    if (preset_name := shortcut(argv, "model.preset")) is not None:
        start["model"] = preset(preset_name)
    model = start.get("model")
    if isinstance(model, ModelConfig) and shortcut(argv, "model.vocab_size") is not None:
        # The special ids are those of the published tokenizer and may lie outside another vocabulary; the run
        # takes its data's.
        start["model"] = replace(model, bos_id=0, eos_id=1)
    return parse(
        argv, PretrainConfig, verb="pretrain", description=main.__doc__, start=start, shortcuts=_SHORTCUTS
    )


def main(argv: Sequence[str]) -> None:
    """Train a model on packed windows, or go on where a run was stopped; on many GPUs under torchrun.

    --profile alone profiles three steps.
    """
    # What happens once is said once.
    log.configure(logging.INFO if launched_rank() == 0 else logging.ERROR)
    config = parse_config(argv)
    data = Path(config.data)
    with pretrain.open_ranks(config) as ranks:
        evaluate = None
        if (data / HELD_OUT).is_dir():
            evaluate = functools.partial(
                held_out_report,
                directory=data,
                max_windows=config.report.eval_windows,
                micro=None if ranks.mesh is None else config.batch.micro,
                ranks=ranks,
            )
        pretrain.run(config, evaluate=evaluate, ranks=ranks)
