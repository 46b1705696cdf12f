"""Laws of what a model costs and how good it gets: published ones (`published.py`)."""
