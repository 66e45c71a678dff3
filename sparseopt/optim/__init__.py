"""Where the active entries are, the optimizer that updates them, and the capture of their gradients."""
