"""The `flashcomm` command: one file a command, with its options, a call into `bench` or `accuracy`, and its output."""
