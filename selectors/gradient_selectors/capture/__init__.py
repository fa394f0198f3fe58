"""One forward and one backward pass over a pool: per-sample gradients as factors."""
