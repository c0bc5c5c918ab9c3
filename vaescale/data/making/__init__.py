"""Data sets written as shards, and shards made by others indexed and verified."""
