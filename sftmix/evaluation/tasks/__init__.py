"""Published tasks, by EleutherAI's lm-evaluation-harness, on local files or by name."""
