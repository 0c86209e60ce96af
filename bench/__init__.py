"""Benchmarks: `python -m bench.CASE key=value …`. Each prints a table and appends its raw samples as JSON."""
