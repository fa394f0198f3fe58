"""From the bytes of a record to token ids with labels."""
