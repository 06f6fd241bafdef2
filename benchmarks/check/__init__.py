"""The steps of benchmarks.gpu_check: building, running, reading what ran, recording."""
