"""What the cloud half uses: aggregation, teachers and its table of per-device state."""
