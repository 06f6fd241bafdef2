"""The benchmarks: bench_<op>.py for each op and stage, run by `dscoder bench` or `make bench`."""
