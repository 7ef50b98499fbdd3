"""Groups and their collectives."""
