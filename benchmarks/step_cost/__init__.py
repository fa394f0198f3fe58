"""What a step costs, against plain training and peers."""
