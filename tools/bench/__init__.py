"""Commands that measure; not tests. See README.md."""
