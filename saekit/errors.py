"""The one error a user can cause."""


class SaekitError(Exception):
    """One line: the fact, the place, what to do. The command line prints it and exits with 2."""
