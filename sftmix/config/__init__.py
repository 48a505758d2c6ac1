"""The config: schema, YAML reader, wording of errors, and the DeepSpeed config made from it."""
