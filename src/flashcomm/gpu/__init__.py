"""Everything that runs on a GPU: Triton kernels, and how they wait for each other and are launched."""
