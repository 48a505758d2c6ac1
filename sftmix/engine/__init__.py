"""One model on DeepSpeed: load, forward, backward, step, save. Only this room imports DeepSpeed."""
