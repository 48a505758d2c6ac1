"""`sftmix doctor`: what would make a run fail or compute wrong numbers, on this machine and on
others."""
