"""The three primitives on PyTorch. Only here, in tasks and in apps is torch imported."""
