"""What several processes agree by."""
