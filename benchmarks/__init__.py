"""What composing costs in time and memory; run by `python -m benchmarks` (docs/benchmarks.md)."""
