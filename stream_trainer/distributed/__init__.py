"""One run on several processes: who reads what, what all must know before a step, and how they stop."""
