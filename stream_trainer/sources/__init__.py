"""Where records come from: one small protocol, and a module for each kind of stream."""
