"""Gaussian mixtures: what they are, where they are kept, and the two steps of expectation-maximization."""
