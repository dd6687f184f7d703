"""What the ranks of a test of evaluation run. Helpers only, no tests."""

import os
from collections.abc import Sequence

from meter_fast import evaluate as program
from meter_fast.data.loader import SplitLoader


def evaluate(argv: Sequence[str]) -> int:
    """meter_fast.evaluate in this process; wrong arguments give their exit code."""
    try:
        return program.main(argv)
    except SystemExit as done:
        return int(done.code or 0)


def fail_on(rank: int, argv: Sequence[str]) -> int:
    """The same where the data of one process cannot be read."""
    if int(os.environ["RANK"]) == rank:

        def fail(self):
            raise ValueError("the table has gone")

        SplitLoader.__iter__ = fail
    return evaluate(argv)
