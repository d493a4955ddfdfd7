"""Fewer bits for each weight, and for what passes between layers."""
