"""Distilling language models, on their own samples too."""
