"""Integrations that nobody has run in the engine itself yet: written from its sources, tested against a stand-in."""
