"""What a format costs a model: simulation, sensitivity, plans, perplexity."""
