"""Faults done to a running trainer, and what an operator sees of each, measured."""
