"""Comparing collaborations on a task: what to run, running it, and the figures it gives."""
