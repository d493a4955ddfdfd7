"""What one model takes on this machine: time, memory, operations and modelled energy."""
