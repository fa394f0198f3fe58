"""Which of the samples that wait get a gradient."""
