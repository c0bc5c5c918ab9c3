"""Gaussian mixtures: their densities and draws, their files, and expectation-maximization."""
