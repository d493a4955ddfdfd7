"""A recommender on the device and in the cloud."""
