"""Runs that train one model apart from each other and meet in a directory, and nowhere else."""
