"""One file per stage. `run(context)` does the work, writes into `context.folder`, and returns the
stage's facts."""
