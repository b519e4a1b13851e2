"""What a model is worth on held-out text and on tasks: `python -m experiments eval`."""
