"""The only room that knows DeepSpeed and ranks: load, head, backward, step, save."""
