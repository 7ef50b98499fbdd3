"""Benchmarks: baselines and timing, all-reduces, the codec, time to first token, and their plots."""
