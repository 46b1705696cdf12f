"""What people look at: the terminal's table, pictures, the HTML report of a run."""
