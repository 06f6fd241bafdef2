"""The stage that writes problems made by rule, and what a model learns from before it meets them.

    corpus.jsonl       functions with docstrings, for `dscoder tokenizer` and `dscoder prepare`
    dialogues.jsonl    requests and answers, for `dscoder sft`
    practised.jsonl    problems with few tests, as real ones have, for `dscoder prefer` and `dscoder grpo`
    validation.jsonl   problems with many tests, for choosing sizes
    test.jsonl         problems with many tests, for the figures in the end

The first two are of one split, the others have one each (`tasks/pipelines.py`). Some of the answers leave out
a step: a model that imitates them does so too, and tests are what tells it not to.
"""

import json
import random
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from dscoder.config.generated import GeneratedConfig
from dscoder.runtime.artifact import open_stage, write_bytes
from dscoder.runtime.log import get_logger
from dscoder.runtime.seed import derive_seed
from dscoder.tasks.generated import documented, question, record_of
from dscoder.tasks.pipelines import Pipeline, draw_pipelines, draw_problems, without_step

COMMAND = "generated"
CORPUS = "corpus.jsonl"
DIALOGUES = "dialogues.jsonl"
PRACTISED = "practised.jsonl"
VALIDATION = "validation.jsonl"
TEST = "test.jsonl"
_LOG = get_logger(__name__)


def _dialogue(pipeline: Pipeline, *, hurried_share: float, seed: int) -> dict[str, str]:
    rng = random.Random(derive_seed("hurried", pipeline.task, seed))
    answer = without_step(pipeline, rng) if rng.random() < hurried_share else pipeline.source
    return {"prompt": question(pipeline.task, documented(pipeline)), "completion": answer}


def _problems(split: str, count: int, *, num_tests: int, seed: int) -> list[dict[str, str]]:
    drawn = draw_problems(split, count, num_tests=num_tests, seed=seed)
    return [
        record_of(pipeline, "\n".join(tests) + "\n", number=number)
        for number, (pipeline, tests) in enumerate(drawn)
    ]


def _write(path: Path, records: Iterable[Mapping[str, str]]) -> None:
    write_bytes(path, "".join(json.dumps(record) + "\n" for record in records).encode())


def run(config: GeneratedConfig) -> Path:
    """Write the files to `config.out`; returns that directory."""
    with open_stage(
        Path(config.out),
        command=COMMAND,
        config=asdict(config),
        inputs={},
        free=("out", "overwrite"),
        overwrite=config.overwrite,
    ) as stage:
        if stage.is_finished:
            _LOG.info("%s is finished already", stage.directory)
            return stage.directory
        num, seed = config.num, config.seed
        taught = draw_pipelines("taught", num.documents + num.dialogues, seed=seed)
        shown, asked = taught[: num.documents], taught[num.documents :]
        files: dict[str, list[dict[str, str]]] = {
            CORPUS: [{"text": documented(pipeline) + pipeline.body} for pipeline in shown],
            DIALOGUES: [
                _dialogue(pipeline, hurried_share=num.hurried_share, seed=seed) for pipeline in asked
            ],
            PRACTISED: _problems("practised", num.practised, num_tests=num.few_tests, seed=seed),
            VALIDATION: _problems("validation", num.validation, num_tests=num.many_tests, seed=seed),
            TEST: _problems("test", num.test, num_tests=num.many_tests, seed=seed),
        }
        for name, records in files.items():
            _write(stage.directory / name, records)
        counts = {name.removesuffix(".jsonl"): len(records) for name, records in files.items()}
        stage.finish(counts=counts)
        _LOG.info("%s: %s", stage.directory, counts)
        return stage.directory
