"""What came of a run: held-out figures, the report, model cards."""
