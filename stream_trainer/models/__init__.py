"""Models and tokenizers: loading them, and saving what was trained."""
