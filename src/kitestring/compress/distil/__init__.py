"""Teaching a small model what a large one knows: one loss, one file, its paper on top."""
