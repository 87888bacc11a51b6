"""Measuring: models to measure, contenders, agreement with float64, timing, and the record of where it was done.

Shared by the command line, the demo and ``benchmarks/``. Importing this package imports no extra.
"""


class UserError(Exception):
    """A request that cannot be served, with a one-line message for whoever made it."""
