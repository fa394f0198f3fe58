"""What can be set: one section in a module."""
