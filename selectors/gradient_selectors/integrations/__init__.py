"""Selection inside other libraries' trainers."""
