"""Metrics of one matter each, for a registry that `metrics` has."""
