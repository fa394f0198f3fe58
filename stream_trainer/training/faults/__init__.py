"""What the trainer does when a step goes wrong: go back, find the samples to blame, get past what kills it."""
