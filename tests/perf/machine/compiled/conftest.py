"""These tests compile kernels: test_compiled.py, one folder up, runs them in a process that can."""

from tests.tools.inputs import INTERPRET

collect_ignore_glob = ["test_*.py"] if INTERPRET else []
