"""Whose a cancellation is: gRPC raises CancelledError, too, in whoever uses a call whose channel is closed.

A channel whose certificate was replaced is closed after a while (`vfleet.limits.OLD_CHANNEL_GRACE_S`). What went over
it is broken off then as by the network, and nobody has asked those to end who used it.
"""

import asyncio


def is_asked_for() -> bool:
    """Return whether somebody has cancelled the present task; if not, a CancelledError in it says that a call ended."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
