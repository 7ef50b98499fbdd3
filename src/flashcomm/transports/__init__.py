"""Where the bytes travel. A transport knows bytes, ranks and time-outs, never formats."""
