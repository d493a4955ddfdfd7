"""Making packages: what a task and a collaboration come to on a device, recorded and exported."""
