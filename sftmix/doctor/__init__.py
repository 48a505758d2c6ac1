"""`sftmix doctor`: find what would make a run fail or give wrong numbers, on this machine and on
others."""
