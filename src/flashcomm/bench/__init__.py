"""How long things take: baselines and timing, all-reduce and codec benchmarks, time to first token, pictures."""
