"""Ranks, as threads."""
