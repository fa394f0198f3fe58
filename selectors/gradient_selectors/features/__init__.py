"""What is known of a sample before any pass."""
