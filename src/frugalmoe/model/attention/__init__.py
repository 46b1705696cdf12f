"""Attention: a contract, kernels that kinds share, and the kinds, one file each in `kinds/`."""
