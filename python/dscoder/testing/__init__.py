"""For tests and benchmarks only: comparison with its tolerances, random cases, poisoned memory, timing."""
