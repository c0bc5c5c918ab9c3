"""Benchmark commands, which are not tests. See README.md."""
