"""What of a large model fits a device: searched, measured, chosen and packed."""
