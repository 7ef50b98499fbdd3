"""Everything that runs on a GPU: Triton kernels, their tiles, their waiting and their launching."""
