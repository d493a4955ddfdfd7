"""Collaborations in which features cross: activations, logits or their gradients."""
