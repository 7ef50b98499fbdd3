"""The `flashcomm` command line."""
