"""Ways of collaborating between devices and a cloud: one algorithm, one file, its paper on top."""
