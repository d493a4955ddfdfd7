"""From a large model to a small one: distil, prune, quantise."""
