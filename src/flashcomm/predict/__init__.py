"""A model of time: what low-bit all-reduces would bring on a machine that nobody has measured yet."""
