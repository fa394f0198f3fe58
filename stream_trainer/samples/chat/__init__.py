"""Conversations: what a record says of one, what the chat template writes of it, and where the assistant speaks."""
