"""What is known of a tile without running it.

Kernels are compiled for GPUs that need not be here (aot.py). Their machine code then tells what
they use (machine_code.py), how many programs share an SM (occupancy.py), and how long they should
take (prediction.py).

This room imports `work` and `rows`.
"""
