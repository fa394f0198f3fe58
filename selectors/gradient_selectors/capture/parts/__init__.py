"""Parts of models that need more than a hook on what a module returns."""
