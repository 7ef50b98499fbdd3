"""The `flashcomm` command. Each command has a file with its options, a call into `bench` or `accuracy`, and output."""
