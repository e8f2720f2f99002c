"""Measures the kernels: sweeps, compile-time analysis, plots, reports and comparisons.

Everything is one command line, `tilelab`, on results files that are data. README.md beside
this file has the schema and the rules of timing.
"""

if __name__ != "tilelab.perf":
    raise ImportError(f"this folder is the package tilelab.perf: import that, not {__name__}")
