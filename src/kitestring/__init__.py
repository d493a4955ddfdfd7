"""Kitestring: collaboration between small models on devices and a large model in the cloud."""

__version__ = "0.1.0"
