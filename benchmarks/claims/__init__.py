"""What the papers behind the four methods claim, each in direction."""
