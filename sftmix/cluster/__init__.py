"""Hosts, launchers, the environment of the ranks, and their logs."""
