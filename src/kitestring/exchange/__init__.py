"""What crosses between a device and the cloud: packed, stored and metered."""
