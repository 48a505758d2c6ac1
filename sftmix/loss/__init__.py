"""The loss: objectives, the head that computes it, what a model does to its logits."""
