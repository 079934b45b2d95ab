"""What runs at every step: state, hooks, the compiled step."""
