"""Which route a message takes: pure functions of what all ranks know."""
