"""What a run is told while it runs: orders, and a new target."""
