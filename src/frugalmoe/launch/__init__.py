"""Starting a run on a cluster: the templates of `launch/`, filled in, checked and handed to the scheduler."""
