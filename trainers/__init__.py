"""Thin adapters over transformers and TRL: ``sparseopt.trainers``."""

if __name__ != "sparseopt.trainers":
    raise ImportError("This folder installs as `sparseopt.trainers`; import it under that name (pip install first).")
