"""The exceptions that a user is meant to see."""


class PerfError(Exception):
    """Wrong input, said in one line; `tilelab` prints it and exits with 2."""


class Help(Exception):
    """Not an error: what the user asked to be told. `tilelab` prints it and exits with 0."""
