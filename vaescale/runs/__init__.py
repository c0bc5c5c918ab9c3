"""Runs: the run folder, its checkpoints and results, their comparison, and tracking in MLflow."""
