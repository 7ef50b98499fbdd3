"""What the ranks of a group find out together, once."""
