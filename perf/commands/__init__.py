"""The commands that compile or measure: sweep, compile, doctor, step and gpu.

The file of a command has `add_arguments(parser)` and `run(args)`, which `tilelab` calls. The others
hold what commands share: arguments.py, provenance.py, and gpu_tasks.py with the tasks of `gpu`.

This room may import every other room. No other room imports it.
"""
