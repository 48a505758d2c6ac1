"""One optimiser step as tensors: encoded examples, their division into micro-batches, and the
tensors of each."""
