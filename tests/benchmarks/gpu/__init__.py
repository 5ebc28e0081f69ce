"""The table of a GPU, equality on it, and its launches: see `__main__`."""
