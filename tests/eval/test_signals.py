"""Two runs beside one another: differences by problem, and a picture."""

from pathlib import Path

import pytest

from dscoder.eval import signals
from dscoder.eval.pass_at_k import Interval
from dscoder.eval.signals import Curve, compare, draw_signals
from dscoder.eval.task_score import Answered, score_of


def answered(problem: str, *passed: bool | None) -> Answered:
    return Answered(problem=problem, texts=("",) * len(passed), passed=(None, *passed))


BEFORE = [answered("a", False, False), answered("b", True, False), answered("c", None, None)]
AFTER = [answered("b", True, True), answered("a", True, False), answered("c", True, True)]
HALF = Interval(mean=0.5, low=0.25, high=0.75)


def test_a_gain_is_over_the_problems_judged_in_both_in_whatever_order() -> None:
    found = compare(BEFORE, AFTER)
    assert found == Interval(mean=0.5, low=0.5, high=0.5)
    assert compare(AFTER, BEFORE).mean == -0.5


def test_a_picture_is_drawn_of_curves_and_scores(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    curves = {name: Curve(steps=(0, 10), rates=(HALF, HALF)) for name in ("raw tests", "reward model")}
    scores = {"SFT": score_of(BEFORE), "raw tests": score_of(AFTER)}
    assert draw_signals(curves, scores, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


def test_without_matplotlib_there_is_a_remark_and_no_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signals, "Figure", None)
    assert not draw_signals({}, {}, tmp_path / "picture.png")
    assert list(tmp_path.iterdir()) == []
