"""How hypothesis draws examples in the kernels' tests: the same ones every time, however long they take."""

from hypothesis import HealthCheck, settings

# `@settings(FIXED, max_examples=50)`. Fixtures of a function only lend modules: examples may share them.
FIXED = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
