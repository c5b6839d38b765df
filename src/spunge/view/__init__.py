"""A local page over a folder of runs."""
