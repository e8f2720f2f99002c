"""Measures the kernels: sweeps, compile-time analysis, plots, reports and comparisons.

Everything is one command line, `python -m perf`, on results files that are data. README.md beside
this file has the schema and the rules of timing.
"""
