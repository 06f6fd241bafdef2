"""Time limits from the time that a reference solution takes on the same machine."""

from dataclasses import replace

from dscoder.sandbox.run import run
from dscoder.sandbox.verdict import Isolation, Limits, Program


def calibrate(
    reference: Program,
    limits: Limits,
    *,
    factor: float = 3.0,
    min_time: float = 1.0,
    num_runs: int = 3,
    isolation: Isolation = "full",
) -> Limits:
    """`limits` with the time that a program may take when the reference takes what it takes here.

    The slowest of `num_runs` runs counts, `factor` times, and never less than `min_time` seconds. The
    reference itself runs under `limits` as they are; ValueError if it does not pass.
    """
    if num_runs < 1 or factor < 1.0:
        raise ValueError(f"calibrate: wants num_runs >= 1 and factor >= 1, got {num_runs} and {factor}")
    slowest = 0.0
    for _ in range(num_runs):
        verdict = run(reference, limits, isolation=isolation)
        if not verdict.is_passed:
            raise ValueError(f"calibrate: the reference must pass, got {verdict.outcome} ({verdict.detail})")
        slowest = max(slowest, verdict.wall)
    return replace(limits, time=max(min_time, factor * slowest))
