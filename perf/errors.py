"""The exceptions that a user is meant to see."""


class PerfError(Exception):
    """Wrong input, said in one line; `python -m perf` prints it and exits with 2."""


class Help(Exception):
    """Not an error: what the user asked to be told. `python -m perf` prints it and exits with 0."""
