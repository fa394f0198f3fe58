"""The trainer: its parts, one step, the loop."""
