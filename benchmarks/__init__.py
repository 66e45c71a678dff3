"""Benchmarks: the suites are ``bench_*.py``; :mod:`sparseopt.benchmarks.report` runs them and keeps results."""
