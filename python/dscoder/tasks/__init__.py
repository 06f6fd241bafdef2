"""Benchmarks and other sets of problems: questions, programs made of answers, and grades."""
