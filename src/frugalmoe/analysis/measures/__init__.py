"""Measures of routing: pure functions on arrays; each docstring has the formula and what chance alone gives."""
