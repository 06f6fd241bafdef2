"""Tasks by their names, with what each of them takes."""

import json
import re
from pathlib import Path

import pytest

from dscoder.cli.main import main
from dscoder.config.task import Scoring, TaskConfig
from dscoder.sandbox.verdict import Limits
from dscoder.tasks.by_name import open_task
from dscoder.tasks.problem import Problem, Task

RECORD = {
    "task_id": "t/1",
    "prompt": "def one():\n",
    "entry_point": "one",
    "test": "def check(f):\n    assert f() == 1",
}


def written(directory: Path, *records: dict[str, str]) -> str:
    path = directory / "records.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


class OneProblem(Task):
    """A task of this test."""

    name = "one"
    limits = Limits()

    def __init__(self, sources: tuple[str, ...]) -> None:
        self.sources = sources

    def problems(self) -> list[Problem]:
        return [Problem(task="one", id="1", prompt="?", max_new_tokens=1)]

    def program(self, problem: Problem, completion: str) -> None:
        return None


def make(config: TaskConfig) -> Task:
    return OneProblem(config.sources)


def test_a_task_is_opened_with_its_records(tmp_path: Path) -> None:
    sources = (written(tmp_path, RECORD),)
    base = open_task(TaskConfig(name="human_eval", sources=sources))
    chat = open_task(TaskConfig(name="human_eval", sources=sources, asking="instruct"))
    assert [task.problems()[0].form for task in (base, chat)] == ["completion", "chat"]
    questions = (written(tmp_path, {"question": "1 + 1?", "answer": "2\n#### 2"}),)
    assert open_task(TaskConfig(name="gsm8k_pal", sources=questions)).problems()[0].answer == "2"


def test_a_task_of_another_package_is_found_by_its_path() -> None:
    task = open_task(TaskConfig(name=f"{__name__}.make", sources=("a",)))
    assert task.name == "one"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"name": "humaneval"},
            "name must be one of human_eval, .* or package.module.function, got 'humaneval'",
        ),
        ({"name": "human_eval"}, "sources of human_eval must name its records, got none"),
        ({"name": "no.such.thing"}, r"no\.such\.thing must be a function that can be imported, got: Module"),
        ({"name": f"{__name__}.nothing"}, "must be a function that can be imported, got: KeyError"),
        (
            {"name": "mbpp", "sources": ("a",), "asking": "instruct_v2"},
            "asking of mbpp must be base or instruct",
        ),
        ({"name": "multipl_e"}, "language must be given for multipl_e and only there, got None"),
        ({"name": "mbpp", "language": "cpp"}, "only there, got cpp for mbpp"),
        ({"name": "mbpp", "examples": "x"}, "examples must be None but for gsm8k_pal, got 'x'"),
        (
            {"name": "mbpp", "scoring": "tests"},
            "scoring must be None but for single_line_infilling, got 'tests'",
        ),
        ({"name": ""}, "name must not be empty"),
    ],
)
def test_what_no_task_takes_is_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_task(TaskConfig(**fields))  # type: ignore[arg-type]


def test_every_named_task_is_in_the_help() -> None:
    source = Path(open_task.__code__.co_filename).read_text()
    named = set(re.findall(r'^    "(\w+)": ', source, flags=re.MULTILINE))
    config = Path(__file__).parents[2] / "python" / "dscoder" / "config" / "task.py"
    assert named
    assert all(name in config.read_text() for name in named)


@pytest.mark.parametrize(
    ("scoring", "is_run", "passes"),
    [(None, False, False), ("first_line", False, False), ("whole", False, True), ("tests", True, None)],
)
def test_the_scoring_of_infilling_is_chosen(
    tmp_path: Path, scoring: Scoring | None, is_run: bool, passes: bool | None
) -> None:
    line = RECORD | {"suffix": "", "canonical_solution": "    return 1\n"}
    sources = (written(tmp_path, line),)
    task = open_task(TaskConfig(name="single_line_infilling", sources=sources, scoring=scoring))
    (problem,) = task.problems()
    completion = "    return 1<|endoftext|>"
    assert (task.program(problem, completion) is not None) is is_run
    assert task.grade(problem, completion, None).is_passed is passes


def test_the_scoring_is_an_option_of_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["prefer", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--task.scoring SCORING" in said
