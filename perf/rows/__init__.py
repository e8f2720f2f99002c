"""Results as data: the file, the ranking of its rows, and statistics of repeated timings.

Every measurement or compilation becomes one row of a results file (results.py). ranking.py sorts
rows into workloads and ranks them, and stats.py has medians, ratios and their intervals.

This room imports only `work` of the other rooms.
"""
