"""What the benchmarks share: reports and pictures."""
