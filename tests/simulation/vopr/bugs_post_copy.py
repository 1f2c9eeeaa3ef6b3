"""The bugs of post-copy: each takes away one of its rules (docs/model.md)."""

from collections.abc import Callable
from typing import Any

from coordinator.migration import Run
from hostd.instance import Instance
from hostd.rest import Rest

Patch = tuple[object, str, Any]


def post_copy_scrubs_at_once() -> list[Patch]:
    async def at_once(self, move):
        return None

    return [(Run, "_await_arrival", at_once)]


def post_copy_access_does_not_wait() -> list[Patch]:
    return [(Instance, "blocks", lambda self, ranges: False)]


def post_copy_loss_not_said() -> list[Patch]:
    async def nothing(self, instance, *, has_none):
        return None

    return [(Rest, "_say_lost_if_gone", nothing)]


# A seed that finds each.
POST_COPY_BUGS: dict[Callable[[], list[Patch]], int] = {
    post_copy_scrubs_at_once: 2,
    post_copy_access_does_not_wait: 1,
    post_copy_loss_not_said: 4,
}
