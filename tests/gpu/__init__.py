"""Tests that only a GPU can decide."""
