"""Collaborations in which data crosses: samples, labels or candidates."""
