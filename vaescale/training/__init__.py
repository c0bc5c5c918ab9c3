"""The training loop and its parts: launch, layouts, step, guard, recorder, checkpoint writer, watchdog."""
