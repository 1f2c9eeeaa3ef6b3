"""The gRPC edge of what moves many functions: drains and rearrangements. Thin."""

# ruff: noqa: N802, ARG002  # methods are named and called as the protos say

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing

import grpc
from google.protobuf.message import Message

from coordinator.context import Context
from coordinator.cordon import cordon
from coordinator.drain import Drain
from coordinator.many_moves import Begin
from coordinator.migration import Options
from coordinator.rearrange_requests import checked_goal, checked_plan, checked_rest, checked_tolerance
from coordinator.rearrangement import asked_of, plan_rearrangement
from coordinator.rearranging import Rearranging
from coordinator.requests import checked_constraints, checked_options, checked_parallel, checked_reason
from coordinator.snapshot import Stored
from coordinator.term import Term
from vfleet.errors import Reason, VfleetError, not_found
from vfleet.parts import check_part, part_key
from vfleet.v1 import migration_service_pb2 as migration_pb
from vfleet.v1.migration_service_pb2_grpc import MigrationServiceServicer
from vfleet.v1.placement_pb2 import Constraints
from vfleet.v1.records_pb2 import Migration

RpcContext = grpc.aio.ServicerContext[Message, Message]
CurrentTerm = Callable[[], Term | None]


class ManyMovesService(MigrationServiceServicer):
    """Drains and rearrangements. `term` returns the term of the moment, if there is one."""

    def __init__(self, context: Context, term: CurrentTerm) -> None:
        self._context = context
        self._term = term

    async def Drain(
        self, request: migration_pb.DrainRequest, context: RpcContext
    ) -> AsyncIterator[migration_pb.DrainResponse]:
        """Empty a part of the fleet while the caller listens."""
        part, reason = check_part("part", request.part), checked_reason(request.reason)
        parallel = checked_parallel(request.parallel)
        constraints, options = checked_constraints(request.constraints), checked_options(request.options)
        await self._context.be_current()
        self._check_there(constraints)
        if part_key(part) not in self._context.snapshot.cordons:
            term = present(self._term(), self._context)
            await term.do(self._context.upheld(lambda: cordon(self._context, part, reason or "drain")))
        begin = self._beginner(options, lambda _: Constraints())
        async with aclosing(Drain(self._context, begin, part, parallel, constraints).run()) as steps:
            async for step in steps:
                yield migration_pb.DrainResponse(functions=step.functions, is_over=step.is_over, is_first=step.is_first)

    async def PlanRearrangement(
        self, request: migration_pb.PlanRearrangementRequest, context: RpcContext
    ) -> migration_pb.PlanRearrangementResponse:
        """Show what would move, why, and what comes of it."""
        goal = checked_goal("goal", request.goal)
        tolerance_percent = checked_tolerance(goal, request.tolerance_percent)
        constraints = checked_rest(request.constraints)
        await self._context.be_current()
        self._check_there(constraints)
        # A large fleet takes seconds, in which a coordinator has its lease to keep.
        still = self._context.snapshot.still()
        return await asyncio.to_thread(plan_rearrangement, still, goal, tolerance_percent, constraints)

    async def Rearrange(
        self, request: migration_pb.RearrangeRequest, context: RpcContext
    ) -> AsyncIterator[migration_pb.RearrangeResponse]:
        """Do the moves of a plan while the caller listens."""
        plan, parallel = checked_plan(request.plan), checked_parallel(request.parallel)
        constraints, options = checked_rest(request.constraints), checked_options(request.options)
        await self._context.be_current()
        self._check_there(constraints)
        moves = {move.function: move for move in plan.moves}
        begin = self._beginner(options, lambda name: asked_of(self._context.snapshot, moves[name], constraints))
        async with aclosing(Rearranging(self._context, begin, plan, parallel).run()) as steps:
            async for step in steps:
                yield migration_pb.RearrangeResponse(
                    functions=step.functions, is_over=step.is_over, is_first=step.is_first
                )

    def _check_there(self, constraints: Constraints) -> None:
        for name in (name for rule in constraints.groups for name in rule.functions):
            if name not in self._context.snapshot.functions:
                raise not_found("function", name)

    def _beginner(self, options: Options, asked: Callable[[str], Constraints]) -> Begin:
        """Return what begins a migration that asks of its targets what is `asked` of the first of its functions."""

        async def begin(name: str, moves: Sequence[migration_pb.MoveRequest]) -> Stored[Migration]:
            term = present(self._term(), self._context)
            wanted = migration_pb.CreateMigrationRequest(
                request_id=name, moves=moves, constraints=asked(moves[0].function)
            )
            return await self._context.upheld(lambda: term.begin(wanted, options, may_wait=False))

        return begin


def present(term: Term | None, context: Context) -> Term:
    """Return the term. Raise what to do about it if there is none."""
    if term is not None:
        return term
    if context.inventory.is_behind:
        message = "etcd was restored from a backup: nothing is begun until it is said: vfleet fleet bump-generation"
        raise VfleetError(Reason.ILLEGAL_STATE, message)
    raise VfleetError(Reason.STORE_UNAVAILABLE, "the coordinator has no session with etcd at the moment")
