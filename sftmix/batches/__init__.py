"""One optimiser step as tensors: the encoded examples, the cut into micro-batches, the batches."""
