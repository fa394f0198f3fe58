"""Which of the samples that wait are drawn."""
