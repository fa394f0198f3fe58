"""The durable truth of a run: one directory, whole or not at all."""
