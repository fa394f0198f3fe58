"""Which layers each sample updates."""
