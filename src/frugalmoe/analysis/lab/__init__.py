"""What needs a checkpoint: evaluations under changed routing, weights, gradients, drops, and the trace of a run."""
