"""Measures the worker beside other ways to do the same, on one machine and in one run
(docs/benchmarks.md)."""
