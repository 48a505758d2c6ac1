"""What is on disk: artifacts with manifests, training checkpoints, unfinished work, and failures of
the disk in one line."""
