"""Benchmarks: ``sparseopt.benchmarks``."""
