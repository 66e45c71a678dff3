"""What changed: sparse deltas between a model and its base."""
