"""The report is data from a hostile place: what is no report is refused, never guessed at."""

import pytest

from dscoder.sandbox.job import read_report

WHOLE = b"step 3 - 1500000 250000 4096 2 1\nabcend\n"


def test_a_whole_report_is_read() -> None:
    (phase,) = read_report(WHOLE)
    assert (phase.exit_code, phase.signal, phase.stopped) == (3, None, "")
    assert (phase.wall, phase.cpu, phase.peak_memory) == (1.5, 0.25, 4096)
    assert (phase.stdout, phase.stderr) == (b"ab", b"c")


def test_steps_come_in_order() -> None:
    phases = read_report(b"step 0 - 1 1 1 0 0\nstep -9 time 1 1 1 4 0\nend\nend\n")
    assert [(phase.exit_code, phase.signal, phase.stopped) for phase in phases] == [
        (0, None, ""),
        (None, 9, "time"),
    ]
    assert phases[1].stdout == b"end\n"


@pytest.mark.parametrize("size", range(len(WHOLE)))
def test_a_part_of_a_report_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match="is no report"):
        read_report(WHOLE[:size])


@pytest.mark.parametrize(
    "report",
    [
        b"step 0 - 1 1 1 -1 0\nend\n",
        b"step 0 - 1 1 1 99 0\nend\n",
        b"step 0 never 1 1 1 0 0\nend\n",
        b"step 0 - 1 1 1 0\nend\n",
        b"step x - 1 1 1 0 0\nend\n",
        b"stop 0 - 1 1 1 0 0\nend\n",
        b"\xff\xfe\nend\n",
        WHOLE + b"more",
    ],
)
def test_a_report_with_a_fault_is_refused(report: bytes) -> None:
    with pytest.raises(ValueError, match="is no report"):
        read_report(report)
