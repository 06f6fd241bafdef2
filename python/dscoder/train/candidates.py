"""Where the candidates of a problem come from, and what the sandbox makes of them."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dscoder.config.generate import EngineConfig, SamplingConfig
from dscoder.config.reward import PreferConfig
from dscoder.infer.engine import Engine
from dscoder.infer.request import Request
from dscoder.runtime.log import get_logger
from dscoder.runtime.seed import derive_seed
from dscoder.sandbox.pool import Pool
from dscoder.sandbox.verdict import Verdict
from dscoder.tasks.problem import Problem, Prompt, Task
from dscoder.tasks.sources import read_records
from dscoder.train.pairs import Candidate, outcome_of, program_key
from dscoder.train.prompts import PromptEncoder, PromptTooLongError

_KEPT_STDERR = 500  # characters, the last ones
_MODEL = "model"
_LOG = get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Completions:
    """The unjudged candidates of one problem."""

    problem: Problem
    prompt: Prompt  # what was asked
    texts: tuple[str, ...]
    finish_reasons: tuple[str | None, ...]
    origins: tuple[tuple[str, int], ...]  # source and index, see Candidate


class Sampled:
    """Candidates drawn from a model. Draws go by problem and number alone, not by what runs beside them."""

    def __init__(self, task: Task, config: PreferConfig) -> None:
        """Load the model of `config`."""
        assert config.model is not None
        self._task = task
        self._config = config
        engine = EngineConfig(
            model=config.model, dtype=config.dtype, device=config.device, batch=config.batch
        )
        self._engine = Engine.load(engine)
        self._encoder = PromptEncoder(
            tokenizer=self._engine.tokenizer,
            max_positions=self._engine.max_positions,
            template=config.template,
            fim_order=config.fim_order,
        )

    def candidates(self, problems: Sequence[Problem]) -> list[Completions]:
        """`num_candidates` completions of each problem; none where its prompt leaves no room for one."""
        asked = [self._asked(problem) for problem in problems]
        answers = iter(self._engine.generate([request for _, requests in asked for request in requests]))
        found = []
        for problem, (prompt, requests) in zip(problems, asked, strict=True):
            own = [next(answers) for _ in requests]
            found.append(
                Completions(
                    problem=problem,
                    prompt=prompt,
                    texts=tuple(answer.text for answer in own),
                    finish_reasons=tuple(answer.finish_reason for answer in own),
                    origins=tuple((_MODEL, idx) for idx in range(len(own))),
                )
            )
        return found

    def _asked(self, problem: Problem) -> tuple[Prompt, list[Request]]:
        prompt = self._encoder.prompt_of(self._task, problem, max_new_tokens=self._config.max_new_tokens)
        try:
            first = self._encoder.request(prompt)
        except PromptTooLongError as error:
            _LOG.warning("%s is left out: %s", problem.id, error)
            return prompt, []
        count = self._config.num_candidates
        return prompt, [replace(first, sampling=self._sampling(problem, idx)) for idx in range(count)]

    def _sampling(self, problem: Problem, idx: int) -> SamplingConfig:
        return SamplingConfig(
            temperature=self._config.temperature,
            top_p=self._config.top_p,
            seed=derive_seed("prefer", self._config.seed, problem.task, problem.id, idx),
        )


def candidate_files(sources: Sequence[str]) -> list[Path]:
    """The JSONL files of `sources`, those of a directory in the order of their names."""
    files: list[Path] = []
    for source in sources:
        path = Path(source)
        found = sorted(path.glob("*.jsonl")) if path.is_dir() else [path] if path.is_file() else []
        if not found:
            raise ValueError(f"prefer: candidates must be JSONL files or directories of them, got {source!r}")
        files += found
    return files


def _names(files: Sequence[Path]) -> list[str]:
    """What candidates say of the file they are from: its name, or its path where several have that name."""
    counts = Counter(path.name for path in files)
    return [path.name if counts[path.name] == 1 else str(path) for path in files]


class Recorded:
    """Candidates that others wrote down: JSONL records with `problem` (its id) and `completion`.

    Verdicts that the records may hold are not believed: every candidate is judged here.
    """

    def __init__(self, task: Task, files: Sequence[Path], *, problems: Sequence[Problem]) -> None:
        """Read all of them; those of other problems are left out, and counted in `num_strangers`."""
        self._task = task
        self._found: defaultdict[str, list[tuple[str, int, dict[str, Any]]]] = defaultdict(list)
        self.num_strangers = 0
        known = {problem.id for problem in problems}
        for name, path in zip(_names(files), files, strict=True):
            records = read_records(path, names=(path.name,), wanted=("problem", "completion"))
            for idx, record in enumerate(records):
                problem = record["problem"]
                if not isinstance(problem, str):
                    raise ValueError(
                        f"prefer: the problem of record {idx} in {name} must be a text, got {problem!r}"
                    )
                if problem in known:
                    self._found[problem].append((name, idx, record))
                else:
                    self.num_strangers += 1
        if self.num_strangers:
            _LOG.warning("%d candidates are of problems that this task does not have", self.num_strangers)

    def candidates(self, problems: Sequence[Problem]) -> list[Completions]:
        """All that were recorded for each problem."""
        return [self._of(problem) for problem in problems]

    def _of(self, problem: Problem) -> Completions:
        found = self._found[problem.id]
        wrong = next((item for item in found if not isinstance(item[2]["completion"], str)), None)
        if wrong is not None:
            raise ValueError(
                f"prefer: the completion of record {wrong[1]} in {wrong[0]} must be a text, "
                f"got {wrong[2]['completion']!r}"
            )
        prompt = self._task.request(problem)
        asked = {record.get("prompt") for _, _, record in found}
        # A model with a short context was asked with fewer examples.
        shorter = next((text for text in problem.shorter_prompts if asked == {text}), prompt.text)
        return Completions(
            problem=problem,
            prompt=replace(prompt, text=shorter),
            texts=tuple(record["completion"] for _, _, record in found),
            finish_reasons=tuple(record.get("finish_reason") for _, _, record in found),
            origins=tuple((name, idx) for name, idx, _ in found),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Judging:
    """Candidates whose programs run: the sandbox works while the next ones are sampled.

    Candidates of the same text share a verdict; each is graded and stored all the same.
    """

    task: Task
    completions: Completions
    keys: tuple[str, ...]
    verdicts: tuple[Future[Verdict] | None, ...]

    @classmethod
    def start(cls, task: Task, completions: Completions, pool: Pool) -> "Judging":
        """Hand the programs of `completions` to `pool`; what is the same text runs once, for all of them."""
        distinct = tuple(dict.fromkeys(completions.texts))
        programs = {text: task.program(completions.problem, text) for text in distinct}
        keys = {text: program_key(program, text) for text, program in programs.items()}
        verdicts = {
            text: None if program is None else pool.submit(program, task.limits)
            for text, program in programs.items()
        }
        return cls(
            task=task,
            completions=completions,
            keys=tuple(keys[text] for text in completions.texts),
            verdicts=tuple(verdicts[text] for text in completions.texts),
        )

    def finish(self) -> list[Candidate]:
        """Wait for the verdicts."""
        asked = self.completions
        judged = []
        for idx, text in enumerate(asked.texts):
            future = self.verdicts[idx]
            verdict = None if future is None else _awaited(future)
            grade = self.task.grade(asked.problem, text, verdict)
            source, number = asked.origins[idx]
            judged.append(
                Candidate(
                    problem=asked.problem.id,
                    form=asked.prompt.form,
                    prompt=asked.prompt.text,
                    suffix=asked.prompt.suffix,
                    source=source,
                    idx=number,
                    completion=text,
                    finish_reason=asked.finish_reasons[idx],
                    program=self.keys[idx],
                    outcome=outcome_of(grade),
                    score=grade.score,
                    detail=grade.detail,
                    is_suspect=grade.is_suspect,
                    verdict=None if verdict is None else _kept(verdict),
                )
            )
        return judged


def _awaited(pending: Future[Verdict]) -> Verdict:
    """The verdict to come; where the sandbox raised or was called off, one that is no answer."""
    try:
        error = pending.exception()
    except CancelledError:
        return Verdict(outcome="sandbox_error", detail="the program was called off")
    if error is None:
        return pending.result()
    _LOG.warning("a candidate was not judged: the sandbox raised %r", error)
    return Verdict(outcome="sandbox_error", detail=f"the sandbox raised: {error!r}")


def _kept(verdict: Verdict) -> dict[str, Any]:
    """What is stored of a verdict."""
    return {
        "outcome": verdict.outcome,
        "exit_code": verdict.exit_code,
        "signal": verdict.signal,
        "wall": round(verdict.wall, 4),
        "cpu": round(verdict.cpu, 4),
        "peak_memory": verdict.peak_memory,
        "compile_wall": None if verdict.compile is None else round(verdict.compile.wall, 4),
        "isolation": verdict.isolation,
        "detail": verdict.detail,
        "stderr": verdict.stderr[-_KEPT_STDERR:],
    }


def hash_problems(problems: Sequence[Problem]) -> str:
    """sha256 of all that the problems say, wherever their records lie."""
    digest = hashlib.sha256()
    for problem in problems:
        fields = asdict(replace(problem, metadata=dict(problem.metadata)))
        digest.update(json.dumps(fields, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def count_outcomes(candidates: Sequence[Candidate]) -> dict[str, int]:
    """How many candidates came out how."""
    return dict(sorted(Counter(candidate.outcome for candidate in candidates).items()))


def candidate_line(candidate: Candidate) -> str:
    """A candidate as a line of JSON."""
    return json.dumps(asdict(candidate)) + "\n"


def read_candidates(path: Path) -> list[Candidate]:
    """The candidates of a file that this package wrote."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [Candidate(**json.loads(line)) for line in lines if line]
