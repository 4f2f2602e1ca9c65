"""Benchmarks: peers in the same run, equality before time, medians, a JSON line a result."""
