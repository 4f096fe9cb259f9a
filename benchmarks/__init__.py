"""Benchmarks: ratios of things measured side by side, written to docs/benchmarks.md."""
