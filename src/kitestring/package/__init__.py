"""What a device downloads: graphs, weights, and what its half does, as data and signed."""
