"""What a device measures: whether results are right, and how long calls take.

correctness.py is the gate before any timing. devices.py times one call, and timing.py decides how
often. host_overhead.py measures what a call costs in Python, before its kernel is launched.

This room imports `work` and `rows`; host_overhead.py also imports `compiler`.
"""
