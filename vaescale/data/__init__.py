"""Data: shards, which are written, indexed and read; the order of the samples; sources of images."""
