"""Setup: what the ranks of a group compare and discover when a Communicator is created."""
