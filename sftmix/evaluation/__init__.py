"""The results of a run: held-out figures, the report, model cards."""
