"""One topic per file. Each function examines one thing and returns findings."""
