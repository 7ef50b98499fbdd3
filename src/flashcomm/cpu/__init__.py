"""The codec compiled for CPUs."""
