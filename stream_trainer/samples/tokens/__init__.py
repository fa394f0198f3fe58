"""Texts to token ids as a whole, with control tokens told from text."""
