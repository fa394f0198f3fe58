"""What the status page shows of a run, gathered between steps."""
