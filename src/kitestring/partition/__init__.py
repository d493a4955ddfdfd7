"""Where to cut a model between a device and the cloud."""
