"""Highlights of a live stream, found on the device and in the cloud."""
