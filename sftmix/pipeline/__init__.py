"""The recipe: the order of stages, what is up to date, running and launching them."""
