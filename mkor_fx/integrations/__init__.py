"""Callbacks that keep factors with the checkpoints of other libraries' training loops; each is imported by its own name."""
