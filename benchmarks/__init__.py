"""Tasks, demo and measurements; run as modules from the root of the checkout (`python -m benchmarks.demo`)."""
