"""From the stream to what waits for the trainer: reading thread, buffer, cursor, dead letters."""
