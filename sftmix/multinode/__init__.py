"""Many nodes: the commands of DeepSpeed's launchers, how they are started, and files for batch systems."""
