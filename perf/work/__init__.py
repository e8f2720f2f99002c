"""What is measured: the operators, and all that a sweep has to know of them.

Each operator is one row of operators.py. The other files have its sizes, tiles, costs, peers and
inputs, and the limits of each GPU. `workloads.py` makes of all this a call that can be timed.

This room imports no other room of perf, only `errors`, `tilelab.kernels` and `tilelab.nets`.
"""
