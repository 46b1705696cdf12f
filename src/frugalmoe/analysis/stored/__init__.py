"""What a run directory holds, read into arrays: the run, its probe of held-out tokens, its trace."""
