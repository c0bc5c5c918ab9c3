"""Metrics of trained models: bounds, reconstructions, calibration, sample quality and baselines."""
