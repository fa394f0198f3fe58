"""A compacted topic as a set of values by key."""
