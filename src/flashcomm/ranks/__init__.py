"""Start ranks, emulate slow links."""
