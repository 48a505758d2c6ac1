"""The loss: objectives, the head that computes it, and the model's transform of its logits."""
