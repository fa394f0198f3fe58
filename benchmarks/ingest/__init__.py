"""How fast records come in."""
