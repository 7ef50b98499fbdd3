"""The accuracy of a model with low-bit all-reduces: simulated ranks, sensitivity of layers, plans, perplexity."""
