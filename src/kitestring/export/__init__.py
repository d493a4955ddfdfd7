"""Models and their training steps in the formats that device runtimes read."""
