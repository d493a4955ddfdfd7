"""Tasks: a small model, a large model, users' rows, a loss and a metric."""
