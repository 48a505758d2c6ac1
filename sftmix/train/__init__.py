"""Training: the plan, the loop, checkpoints, the log and its meter."""
