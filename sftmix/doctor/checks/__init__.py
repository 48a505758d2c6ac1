"""An item per file. Each function looks at one thing and returns findings."""
