"""Published models: immutable versions of durable checkpoints for servers, and what follows from each."""
