"""Where a run runs: hosts, launchers, the environment of the ranks, their logs."""
