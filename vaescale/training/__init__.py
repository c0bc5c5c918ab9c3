"""The loop and what it leans on: the launch, the step, checkpoints, the run folder, tracking."""
