"""Fewer weights: single ones, two of every four, or whole channels, heads and neurons."""
