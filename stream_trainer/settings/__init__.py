"""Every setting: what it means, where its value comes from, and what is wrong with it."""
