"""Runs on several processes."""
