"""Shards (written, indexed, read), the order of the samples, and where the images come from."""
