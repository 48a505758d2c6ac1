"""What can be wrong with a machine, found before a run does. Each item is a small function that returns findings."""
