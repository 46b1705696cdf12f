"""Runs that train one model apart and meet in a store of files, and nowhere else."""
