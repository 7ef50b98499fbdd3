"""Integrations with inference engines and torch.distributed: each module does nothing until it is imported by name."""
