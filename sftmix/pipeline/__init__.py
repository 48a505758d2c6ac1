"""The recipe: the order of stages, which are up to date, running and launching them."""
