"""The books of experiments: a registry of runs, views of it, and sweeps. Nothing here imports torch."""
