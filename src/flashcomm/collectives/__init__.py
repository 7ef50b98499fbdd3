"""The collective algorithms, as sequences of exchanges. Each returns the bits of `flashcomm.reference`."""
