"""Files on disk: artifacts with manifests, training checkpoints, unfinished work, and clear errors
for disk failures."""
