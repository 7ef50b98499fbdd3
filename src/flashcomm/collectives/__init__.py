"""How the bytes go round: each algorithm gives the bits of `flashcomm.reference`."""
