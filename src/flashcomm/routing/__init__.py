"""Routing: pure functions that choose the route of a message from values that are equal on all ranks."""
