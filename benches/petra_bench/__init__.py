"""The levels of the whole-command benchmarks, what they share, and the report. `benches/run --help` says how to use it."""
