"""The config: its schema, how a YAML file is read, how its mistakes are worded, and the DeepSpeed
config made from it."""
