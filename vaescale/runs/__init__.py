"""The run folder: what is in it, its checkpoints, its results, and how MLflow gets them."""
