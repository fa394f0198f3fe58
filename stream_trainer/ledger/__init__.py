"""Which records were trained on, in which step and with what coefficient, and what became of the others."""
