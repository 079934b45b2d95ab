"""The two doors, and what else a user calls: they join model, passes and runtime."""
