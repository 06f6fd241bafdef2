"""Time limits from a reference solution."""

import pytest

from dscoder.sandbox import calibrate as calibrate_module
from dscoder.sandbox.calibrate import calibrate
from dscoder.sandbox.verdict import Limits, Program, Verdict

REFERENCE = Program(source="pass")


def taking(monkeypatch: pytest.MonkeyPatch, *seconds: float, outcome: str = "passed") -> None:
    verdicts = iter([Verdict(outcome=outcome, wall=wall, detail="why") for wall in seconds])
    monkeypatch.setattr(calibrate_module, "run", lambda *_, **__: next(verdicts))


def test_the_slowest_run_counts_times_the_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    taking(monkeypatch, 1.0, 2.0, 1.5)
    assert calibrate(REFERENCE, Limits(time=10.0, output=7), factor=2.5) == Limits(time=5.0, output=7)


def test_a_fast_reference_leaves_the_least_time(monkeypatch: pytest.MonkeyPatch) -> None:
    taking(monkeypatch, 0.01)
    assert calibrate(REFERENCE, Limits(), num_runs=1, min_time=0.5).time == 0.5


def test_a_reference_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    taking(monkeypatch, 0.01, outcome="failed")
    with pytest.raises(ValueError, match=r"the reference must pass, got failed \(why\)"):
        calibrate(REFERENCE, Limits())


@pytest.mark.parametrize("wrong", [{"num_runs": 0}, {"factor": 0.5}])
def test_wrong_arguments_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="wants num_runs >= 1 and factor >= 1"):
        calibrate(REFERENCE, Limits(), **wrong)


@pytest.mark.usefixtures("full_isolation")
def test_a_real_reference_is_timed() -> None:
    limits = calibrate(Program(source="import time\ntime.sleep(0.4)"), Limits(), num_runs=1)
    assert 1.2 <= limits.time < 6.0
