"""Measures the kernels: sweeps, compile-time analysis, plots, reports and comparisons.

The command `tilelab` does everything, and results files are what its parts exchange. README.md
beside this file has the rules of timing, the schema of results files, and the rooms (folders).
"""

if __name__ != "tilelab.perf":
    raise ImportError(f"this folder is the package tilelab.perf: import that, not {__name__}")
