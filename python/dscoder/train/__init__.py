"""Pre-training: schedule, optimizer, loss, the step, checkpoints and what a run leaves on disk."""
