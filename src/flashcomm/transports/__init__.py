"""Transports: they move bytes between ranks, with time-outs. They do not know about formats."""
