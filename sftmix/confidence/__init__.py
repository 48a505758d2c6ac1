"""The confidence of examples: its definition, scoring under checkpoints, and score tables."""
