"""Which processes are alive: heartbeats, the run lock, progress, requests to stop."""
