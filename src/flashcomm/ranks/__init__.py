"""Ranks on one machine: processes that are started and watched, and emulated slow links between them."""
