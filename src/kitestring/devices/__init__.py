"""What a device is: its hardware profile, its rows and its training."""
