"""Gradient-based selection: from one forward and one backward pass over a pool to what enters the update.

Tensors in, decisions out: nothing here knows of streams, files or services. Names follow the shape suffixes explained
in `factors`.
"""
