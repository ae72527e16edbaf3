"""The garbage collector of a process whose objects mostly stay: connections, and the history's events.

A collection stops the loop while it looks at everything that it has not been told to leave alone. So what the start
has made is left alone for good, and the young are looked at in batches as large as the loop can bear: an event that
stays is then looked at twice or three times in its life. What ends by itself, as connections do, needs no collector.
"""

from __future__ import annotations

import gc

# New objects that make a collection of the youngest (some 2 ms); and how many of these make one of the next generation.
_YOUNG = 50_000
_MIDDLE = 20
# The oldest are looked at when they have grown by a quarter (CPython's own rule), and not before so many of the middle.
_OLD = 50


def settle() -> None:
    """Call this once when the process is ready to serve."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, _MIDDLE, _OLD)
