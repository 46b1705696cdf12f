"""Published models in, ours out: directories in the layout of Hugging Face, and run directories.

`families/` has a file for each family of models, which says how its config.json and the names of its tensors are ours.
"""
