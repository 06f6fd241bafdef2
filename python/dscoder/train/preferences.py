"""The stage `dscoder prefer`: candidates are run through their tests and become preference pairs.

    candidates/00000.jsonl   every candidate of a few problems with its verdict and score, judged or not
    graded.jsonl             the distinct programs, each with its pass rate: what a pointwise loss learns
    pairs.jsonl              a better and a worse one to the same prompt: what a pairwise loss learns

A file of candidates is written when all of its problems are judged; a run that is killed goes on with the
first problem that has none. The two other files follow from them and hold no times, so the same candidates
and verdicts give the same bytes.
"""

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path

from dscoder.config.reward import PairsConfig, PreferConfig
from dscoder.runtime.artifact import Stage, hash_files, open_stage, write_bytes
from dscoder.runtime.log import get_logger
from dscoder.runtime.seed import available_threads, derive_seed, deterministic
from dscoder.sandbox.pool import Pool
from dscoder.tasks.by_name import open_task
from dscoder.tasks.problem import Problem, Task
from dscoder.train.candidates import (
    Judging,
    Recorded,
    Sampled,
    candidate_files,
    candidate_line,
    count_outcomes,
    hash_problems,
    read_candidates,
)
from dscoder.train.pairs import Candidate, NoPairsError, choose_pairs, pool_answers, suspect_programs
from dscoder.train.run import hash_model

COMMAND = "prefer"
CANDIDATES = "candidates"
GRADED = "graded.jsonl"
PAIRS = "pairs.jsonl"
_PROBLEMS_PER_FILE = 16
_FREE = ("out", "model", "candidates", "task", "num_workers", "num_threads", "overwrite")
_LOG = get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """What a run works on."""

    config: PreferConfig
    task: Task
    problems: Sequence[Problem]
    recorded: Recorded | None  # candidates of others; None: a model is sampled

    def chunks(self, directory: Path) -> Iterator[tuple[Path, Sequence[Problem]]]:
        """The files of candidates, and the problems of each."""
        for start in range(0, len(self.problems), _PROBLEMS_PER_FILE):
            name = f"{start // _PROBLEMS_PER_FILE:05d}.jsonl"
            yield directory / CANDIDATES / name, self.problems[start : start + _PROBLEMS_PER_FILE]


@dataclass(kw_only=True, slots=True)
class _Written:
    """The lines of the two results, and what they were made from."""

    graded: list[str] = field(default_factory=list)
    pairs: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    pair_outcomes: Counter[str] = field(default_factory=Counter)
    chosen_lengths: list[int] = field(default_factory=list)  # characters
    rejected_lengths: list[int] = field(default_factory=list)


def _store(path: Path, judging: Sequence[Judging]) -> None:
    """Wait for the verdicts of one file and write it, unless the sandbox itself is at fault for all."""
    judged = [candidate for part in judging for candidate in part.finish()]
    if judged and all(candidate.score is None for candidate in judged):
        raise RuntimeError(
            f"prefer: no candidate of {len(judging)} problems could be judged; the first: {judged[0].detail}"
        )
    write_bytes(path, "".join(map(candidate_line, judged)).encode())
    _LOG.info("%s: %d candidates, %s", path.name, len(judged), count_outcomes(judged))


def _judge_all(run: _Run, directory: Path) -> None:
    """Write every file of candidates that is not there."""
    missing = [(path, problems) for path, problems in run.chunks(directory) if not path.is_file()]
    if not missing:
        return
    source = run.recorded or Sampled(run.task, run.config)
    (directory / CANDIDATES).mkdir(exist_ok=True)
    with Pool(num_workers=run.config.num_workers, isolation=run.config.isolation) as pool:
        waiting: tuple[Path, list[Judging]] | None = None
        for path, problems in missing:
            # Sampled while the sandboxes of the file before are at work.
            found = source.candidates(problems)
            started = [Judging.start(run.task, completions, pool) for completions in found]
            if waiting is not None:
                _store(*waiting)
            waiting = (path, started)
        if waiting is not None:
            _store(*waiting)


def _asked(candidate: Candidate, task: str) -> dict[str, str]:
    return {
        "task": task,
        "problem": candidate.problem,
        "form": candidate.form,
        "prompt": candidate.prompt,
        "suffix": candidate.suffix,
    }


def _add_problem(
    written: _Written, candidates: Sequence[Candidate], *, task: str, config: PairsConfig, seed: int
) -> None:
    """The lines of one problem's candidates."""
    answers = pool_answers(candidates)
    withheld = suspect_programs(candidates)
    known = [candidate for candidate in candidates if candidate.score is not None]
    judged = [candidate.score or 0.0 for candidate in known if candidate.program not in withheld]
    written.outcomes.update(count_outcomes(candidates))
    written.counts["candidates"] += len(candidates)
    written.counts["passed"] += sum(candidate.outcome == "passed" for candidate in candidates)
    written.counts["answers"] += len(answers)
    written.dropped["not_judged"] += len(candidates) - len(known)
    written.dropped["suspect"] += len(known) - len(judged)
    written.dropped["same_program"] += len(judged) - len(answers)
    if not answers:
        return
    asked = _asked(candidates[0], task) | {"prompt_pass_rate": statistics.fmean(judged)}
    written.graded += [json.dumps(asked | asdict(answer)) + "\n" for answer in answers]
    own_seed = derive_seed("pairs", seed, task, candidates[0].problem)
    pairs = choose_pairs(answers, config, seed=own_seed)
    written.counts["pairs"] += len(pairs)
    written.counts["problems_with_pairs"] += bool(pairs)
    for chosen, rejected in pairs:
        line = asked | {"chosen": asdict(chosen), "rejected": asdict(rejected)}
        written.pairs.append(json.dumps(line) + "\n")
        written.pair_outcomes[f"{chosen.outcome} > {rejected.outcome}"] += 1
        written.chosen_lengths.append(len(chosen.completion))
        written.rejected_lengths.append(len(rejected.completion))


def _mean(values: Sequence[int]) -> float | None:
    return statistics.fmean(values) if values else None


def write_results(
    stage: Stage,
    groups: Iterable[Sequence[Candidate]],
    *,
    task: str,
    config: PairsConfig,
    seed: int,
    num_problems: int,
    num_strangers: int | None = None,
) -> None:
    """Write graded answers and pairs of `groups`, the candidates of one problem each, and the manifest.

    Args:
        num_problems: of all, those without candidates too.
        num_strangers: candidates of other problems, where that is known.

    NoPairsError if no two answers to a prompt differ.
    """
    written = _Written()
    num_groups = 0
    for group in groups:
        num_groups += 1
        _add_problem(written, group, task=task, config=config, seed=seed)
    written.dropped["problems_without_candidates"] += num_problems - num_groups
    if not written.pairs:
        raise NoPairsError(
            "prefer: some problem must have a better and a worse answer, got none among "
            f"{written.counts['candidates']} candidates of {num_problems} problems: {dict(written.outcomes)}"
            f", {written.dropped['suspect']} left out as suspect"
        )
    write_bytes(stage.directory / GRADED, "".join(written.graded).encode())
    write_bytes(stage.directory / PAIRS, "".join(written.pairs).encode())
    if num_strangers is not None:
        written.dropped["unknown_problem"] = num_strangers
    stage.finish(
        counts={"problems": num_problems, **written.counts},
        dropped=written.dropped,
        facts={
            "task": task,
            "outcomes": dict(sorted(written.outcomes.items())),
            "pair_outcomes": dict(sorted(written.pair_outcomes.items())),
            # A reward model can learn length where these differ.
            "mean_characters": {
                "chosen": _mean(written.chosen_lengths),
                "rejected": _mean(written.rejected_lengths),
            },
        },
        results=(PAIRS, GRADED),
    )
    _LOG.info("%d pairs of %d problems", len(written.pairs), written.counts["problems_with_pairs"])


def _written_groups(run: _Run, directory: Path) -> Iterator[Sequence[Candidate]]:
    """The candidates of each problem that has some, from their files."""
    for path, _ in run.chunks(directory):
        for _, group in groupby(read_candidates(path), key=lambda candidate: candidate.problem):
            yield list(group)


def _opened(config: PreferConfig, task: Task) -> _Run:
    problems = task.problems()[: config.max_problems]
    if not problems:
        raise ValueError(f"prefer: task {task.name} must have problems, got none")
    files = candidate_files(config.candidates)
    recorded = Recorded(task, files, problems=problems) if files else None
    return _Run(config=config, task=task, problems=problems, recorded=recorded)


def run(config: PreferConfig, *, task: Task | None = None) -> Path:
    """Sample or read candidates, judge them, and write pairs to `config.out`; returns that directory.

    Args:
        task: in place of the one that `config.task` names.

    Raises:
        ValueError: config, task and candidates do not go together, or no two answers to a prompt differ.
        RuntimeError: the sandbox could judge nothing.
    """
    work = _opened(config, task or open_task(config.task))
    inputs = {"problems": hash_problems(work.problems)}
    if config.model is not None:
        inputs["model"] = hash_model(config.model)
    else:
        files = candidate_files(config.candidates)
        inputs["candidates"] = hash_files([(path.name, path) for path in files])
    with open_stage(
        Path(config.out),
        command=COMMAND,
        config=asdict(config),
        inputs=inputs,
        free=_FREE,
        overwrite=config.overwrite,
        is_resumable=True,
    ) as stage:
        if stage.is_finished:
            _LOG.info("%s is finished already", stage.directory)
            return stage.directory
        with deterministic(seed=config.seed, num_threads=config.num_threads or available_threads()):
            _judge_all(work, stage.directory)
        write_results(
            stage,
            _written_groups(work, stage.directory),
            task=work.task.name,
            config=config.pairs,
            seed=config.seed,
            num_problems=len(work.problems),
            num_strangers=None if work.recorded is None else work.recorded.num_strangers,
        )
        return stage.directory
