"""Which candidates enter the update, and with what coefficient."""
