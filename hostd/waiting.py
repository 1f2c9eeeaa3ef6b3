"""An access of a driver on its way to its function, from when it is submitted until it has its answer."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass

from hostd.sequencer import Result
from hostd.translation import Entry
from vfleet.address import translate
from vfleet.v1.access_pb2 import AccessKind, Session
from vfleet.v1.fabric_service_pb2 import ExchangeRequest


@dataclass(slots=True, eq=False)
class Waiting:
    """An access without an answer. Its sequence is 0 until it is first sent, unless its client gave it one.

    A client that gives sequences may ask again for an answer that this host already has.
    """

    kind: AccessKind.ValueType
    virtual_address: int
    length: int
    data: bytes
    sequence: int = 0
    may_ask_again: bool = False
    _outcome: Result | BaseException | None = None
    _answer: "asyncio.Future[Result] | None" = None

    @property
    def outcome(self) -> Result | BaseException | None:
        """The answer, or what came instead of it, if it is there."""
        return self._outcome

    @property
    def answer(self) -> "asyncio.Future[Result]":
        """The answer, for whoever waits for it: made when it is asked for, as of many accesses few are waited for."""
        if self._answer is None:
            self._answer = asyncio.get_running_loop().create_future()
            if self._outcome is not None:
                _settle(self._answer, self._outcome)
        return self._answer

    def finish(self, outcome: Result | BaseException) -> None:
        """Give the answer, or what came instead of it, to whoever still waits for it."""
        self._outcome = outcome
        if self._answer is not None and not self._answer.done():
            _settle(self._answer, outcome)

    def finish_as(self, first: "Waiting") -> None:
        """Give it the answer of another access of the same sequence, once that has it."""
        first.answer.add_done_callback(self._finish_as)

    def _finish_as(self, answer: "asyncio.Future[Result]") -> None:
        error = answer.exception()
        self.finish(answer.result() if error is None else error)


def exchange_request(entry: Entry, session: Session, acknowledged: int, accesses: Iterable[Waiting]) -> ExchangeRequest:
    """Return accesses through an entry, each with its sequence, as they go to another host.

    `acknowledged` is the last sequence up to which no answer will be asked for again.
    """
    request = ExchangeRequest(
        driver=entry.driver,
        function=entry.function,
        generation=entry.generation,
        acknowledged_sequence=acknowledged,
        session=session,
    )
    offset = entry.offset
    # In half the time of a list of accesses, which would be copied.
    add = request.accesses.add
    for access in accesses:
        message = add()
        message.sequence = access.sequence
        message.kind = access.kind
        message.address = translate(access.virtual_address, offset)
        message.length_bytes = access.length
        if access.data:
            message.data = access.data
    return request


def _settle(answer: "asyncio.Future[Result]", outcome: Result | BaseException) -> None:
    if isinstance(outcome, BaseException):
        answer.set_exception(outcome)
        # Nobody may be left who asks for it.
        answer.exception()
    else:
        answer.set_result(outcome)
