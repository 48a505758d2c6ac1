"""Liveness of processes: heartbeats, the run lock, progress, requests to stop."""
