"""Tasks that outlive the work that starts them and don't belong to it: neither their log lines nor their calls do."""

import asyncio
from collections.abc import Coroutine
from contextvars import copy_context
from typing import TypeVar

from vfleet import log, tracing

ResultT = TypeVar("ResultT")


def in_background(work: Coroutine[None, None, ResultT], name: str) -> asyncio.Task[ResultT]:
    """Start `work` as nobody's: not for the migration, function or call that happens to start it."""
    context = copy_context()
    context.run(log.unbind)
    context.run(tracing.unbind)
    return asyncio.create_task(work, name=name, context=context)
