"""What collaborations are compared with: no collaboration, and giving everything away."""
