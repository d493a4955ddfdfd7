"""Collaborations at the time of a request: the device answers, or asks the cloud."""
