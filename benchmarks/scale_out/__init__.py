"""What a step costs on several processes, against one, and what they send each other."""
