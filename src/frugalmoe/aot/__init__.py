"""Compiling a training step ahead of time for devices that are not here: its memory, its collectives, what fits."""
