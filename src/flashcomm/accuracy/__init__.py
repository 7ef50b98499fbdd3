"""What a wire format costs a model: simulated ranks, sensitivity of layers, plans, perplexity."""
