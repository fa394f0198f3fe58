"""The ranks that train one model together: what they exchange, and how samples are dealt to them."""
