"""One run: a fleet of three hosts and two coordinators, drivers at work, migrations, faults, and then peace.

    set up -> migrations, accesses and faults, as the seed has them -> heal -> quiet -> check

`simulate` is the whole of it; the same seed and program give the same trace, to the last message.
"""

import asyncio
import gc
import hashlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from random import Random
from typing import Any
from unittest import mock

from simulation.vopr.accelerator import AcceleratorClient
from simulation.vopr.drivers import DriverClient, UnnumberedClient
from simulation.vopr.etcd import EtcdServer
from simulation.vopr.faults import ACTIONS, CALM, Profile, do_faults, draw_profile
from simulation.vopr.history import History
from simulation.vopr.loop import LIFE, Life, SimulatedLoop, StuckError
from simulation.vopr.network import Network
from simulation.vopr.operators import Guest, Operator, cancel, set_up
from simulation.vopr.processes import CoordinatorProcess, HostProcess, Process
from simulation.vopr.restoration import lose_and_restore

from hostd.driver import Driver
from hostd.functions import Functions
from hostd.instance import Instance
from vfleet import failpoint
from vfleet.etcd.keys import registration_key
from vfleet.v1.records_pb2 import Phase

CHAOS_S = 30.0
LOSS_OF_ETCD = 0.15  # of the runs
QUIET_S = 120.0
HOLD_BOUND_S = 6.0
LOSSY_HOLD_BOUND_S = 15.0  # while etcd's answers get lost, or take seconds
SWEEPS = 8


@dataclass(frozen=True)
class Outcome:
    """What came of a run."""

    seed: int
    violations: tuple[str, ...]
    hits: dict[str, int]
    digest: str
    callbacks: int
    lines: tuple[str, ...]


class World:
    """Everything in a run."""

    def __init__(self, seed: int, *, verbose: bool, accelerated: bool = False) -> None:
        self.random = Random(seed)
        self.loop = SimulatedLoop()
        self.profile: Profile = CALM
        self.chaos = draw_profile(self.random)
        self.profile = Profile(**{**vars(CALM), "lease_ttl_s": self.chaos.lease_ttl_s})
        self.etcd = EtcdServer(self.loop, self.random, self.profile, self.trace)
        self.network = Network(self.loop, self.random, self.profile, self.trace)
        self.history = History(self)
        self.lines: list[str] = []
        self._verbose = verbose
        self._digest = hashlib.blake2b(digest_size=16)
        self.is_at_peace = True
        self.hosts = {name: HostProcess(self, name) for name in ("h1", "h2", "h3")}
        self.coordinators = {name: CoordinatorProcess(self, name) for name in ("c1", "c2")}
        self.client = Life("client")
        self.is_accelerated = accelerated
        self.drivers: list[DriverClient | UnnumberedClient | AcceleratorClient] = []
        self._power_cycles: dict[str, float] = {}
        self.etcd.observers.append(self.history.etcd_changed)
        self.network.observe = self.history.arrived
        self.network.delivered_again = self.history.delivered_again
        self.armed: dict[str, str] = {}
        self._awaited: dict[str, asyncio.Event] = {}
        self.loses_etcd = self.random.random() < LOSS_OF_ETCD
        self._faults: asyncio.Future[None] | None = None

    def cancel_all(self) -> None:
        """Have somebody cancel whatever is undecided."""
        for name, (record, _) in self.history.migrations.items():
            if record.phase == Phase.PHASE_PREPARING:
                self.network.later(0.0, lambda name=name: self.loop.start(self.client, cancel(self, name)))

    def trace(self, *what: object) -> None:
        """Note that something happened, as part of the run's fingerprint."""
        line = f"{self.loop.time():.6f} {' '.join(map(str, what))}"
        self._digest.update(line.encode())
        if self._verbose:
            self.lines.append(line)

    @property
    def digest(self) -> str:
        """The run's fingerprint so far."""
        return self._digest.hexdigest()

    def process(self, name: str) -> Process:
        """Return a process."""
        return self.hosts.get(name) or self.coordinators[name]

    async def repaired(self) -> None:
        """Wait while etcd has forgotten something that is to be brought back first."""
        while self.history.forgotten is not None and not self.history.violations:
            await asyncio.sleep(0.1)

    def set_profile(self, profile: Profile) -> None:
        """Let other things go wrong from now on."""
        self.profile = self.etcd.profile = self.network.profile = profile

    # --- death ---

    def may_die(self, life: Life, share: float) -> None:
        """Kill the process in whose step this is, if the dice say so."""
        if not self.is_at_peace and self.random.random() < self.profile.failpoint_death * share:
            self.trace("killed at its ledger", life.name)
            self.kill(self.process(life.name), self.random.uniform(0.2, 6.0))
            life.check()

    def reached(self, _: object, name: str) -> None:
        """Do what is to happen at a failpoint."""
        life = LIFE.get()
        assert life is not None
        life.check()
        if name == "hostd.resolve_hold.after":
            self.history.hits["hold resolved by a host"] += 1
        if name in self._awaited:
            self._awaited.pop(name).set()
        if self.is_at_peace:
            return
        action = self.armed.pop(name, None)
        if action is not None:
            self.trace("at", name, life.name, action)
            ACTIONS[action](self, self.process(life.name))
        elif self.random.random() < self.profile.failpoint_death:
            self.trace("killed at", name, life.name)
            self.kill(self.process(life.name), self.random.uniform(0.2, 6.0))
        life.check()

    async def until_reached(self, name: str, at_most_s: float) -> bool:
        """Wait until any process reaches a failpoint. Return False if none does in time."""
        event = self._awaited.setdefault(name, asyncio.Event())
        with suppress(TimeoutError):
            async with asyncio.timeout(at_most_s):
                await event.wait()
        return event.is_set()

    def died(self, process: Process) -> None:
        """Count a death."""
        self.trace("dies", process.name)
        if self.history.undecided():
            self.history.hits["crash before COMMIT"] += 1
        if self.history.decided():
            self.history.hits["crash after COMMIT"] += 1

    def kill(self, process: Process, down_s: float) -> None:
        """Kill a process, and start it again after a while."""
        if not process.is_up:
            return
        process.kill()
        self.network.later(down_s, self.revive, process)

    def power_cycle(self, process: HostProcess) -> None:
        """Switch a machine off and on, but not where a restored etcd is to bring everything back."""
        if self.loses_etcd:
            return
        self._power_cycles[process.name] = self.loop.time()
        process.must_power_cycle = True
        self.kill(process, self.random.uniform(0.5, 8.0))

    def reboot(self, process: HostProcess) -> None:
        """Start a machine anew in good order: it takes its registration away, and is back at once. Else as above."""
        if self.loses_etcd:
            return
        self.trace("reboots", process.name)
        self._power_cycles[process.name] = self.loop.time()
        process.must_power_cycle = True
        registration = self.etcd.state.get(registration_key(process.name))
        self.kill(process, self.random.uniform(0.05, 0.5))
        if registration is not None and registration.lease:
            self.etcd.revoke(registration.lease)

    def was_power_cycled(self, host: str, function: str) -> bool:
        """Whether a machine was switched off and on since the last migration of a function began."""
        return self._power_cycles.get(host, -1.0) >= self.history.begun_s.get(function, 0.0)

    def has_lost(self, host: str, incarnation: str) -> bool:
        """Whether a machine was started anew since it had this incarnation."""
        return self.hosts[host].incarnation != incarnation

    def revive(self, process: Process) -> None:
        """Start a process that is down."""
        if not process.is_up:
            process.start()

    def gave_up(self, process: Process) -> None:
        """See a process end by itself."""
        self.kill(process, 1.0)

    def stop(self, process: Process, for_s: float) -> None:
        """Stop a process for a while."""
        life = process.life
        if life.is_alive and not life.is_stopped:
            self.trace("stops", process.name)
            self.loop.stop_life(life)
            self.network.later(for_s, self._go_on, life)

    def _go_on(self, life: Life) -> None:
        if life.is_stopped:
            self.trace("goes on", life.name)
            self.loop.continue_life(life)

    # --- the run ---

    async def run(self) -> None:
        """Do all of it."""
        for process in (*self.hosts.values(), *self.coordinators.values()):
            process.start()
        await set_up(self)
        self.is_at_peace = False
        self.set_profile(self.chaos)
        askers = (Operator(self, 0), Operator(self, 1), Guest(self))
        work = [asyncio.ensure_future(asker.run()) for asker in askers]
        driving = [asyncio.ensure_future(driver.run()) for driver in self.drivers]
        self._faults = asyncio.ensure_future(do_faults(self))
        bounding = asyncio.ensure_future(self._bound_holds())
        restoring = asyncio.ensure_future(lose_and_restore(self)) if self.loses_etcd else None
        await asyncio.sleep(CHAOS_S)
        if restoring is not None:
            await restoring
        self._heal()
        await self._until(lambda: all(task.done() for task in work), "the operators got no answers")
        await self._until(
            lambda: all(over(record) for record, _ in self.history.migrations.values()), "not all is over"
        )
        for driver in self.drivers:
            driver.is_ending = True
        await self._until(lambda: all(task.done() for task in driving), "drivers got no answers")
        if self.history.violations:
            return
        for task in (*work, *driving):
            task.result()
        # Whatever waits for a deadline has it behind it then.
        await asyncio.sleep(15.0)
        bounding.cancel()
        self.history.check_end()

    async def _bound_holds(self) -> None:
        """See to it that a hold past its deadline is resolved while its host and etcd are well."""
        while True:
            await asyncio.sleep(1.0)
            is_lossy = self.profile.store_loss or self.profile.slowness
            bound_s = LOSSY_HOLD_BOUND_S if is_lossy else HOLD_BOUND_S
            for process in self.hosts.values():
                is_cut_off = not self.etcd.can_reach(process.name) or self.history.forgotten is not None
                if not process.is_up or process.life.is_stopped or is_cut_off:
                    process.well_since_s = self.loop.time()
                if process.host is None or self.loop.time() - process.well_since_s < bound_s:
                    continue
                for hold in process.host.drivers.holds():
                    if hold.resolve_time + bound_s < process.clock.time():
                        self.history.violate(7, f"{process.name} holds {hold.function} for long past its deadline")

    def _heal(self) -> None:
        self.trace("peace")
        self.is_at_peace = True
        self.end_faults()

    def end_faults(self) -> None:
        """Let nothing more go wrong, and mend everything but etcd."""
        if self._faults is not None:
            self._faults.cancel()
        self.armed.clear()
        self.set_profile(CALM)
        self.network.heal()
        self.etcd.cut.clear()
        for process in (*self.hosts.values(), *self.coordinators.values()):
            self._go_on(process.life)
            self.revive(process)

    async def _until(self, condition: Callable[[], bool], otherwise: str) -> None:
        give_up_s = self.loop.time() + QUIET_S
        while not condition() and not self.history.violations:
            if self.loop.time() > give_up_s:
                self.history.violate(7, otherwise)
                return
            await asyncio.sleep(0.25)


def over(record: Any) -> bool:
    """Whether a migration is over."""
    return record.phase in (4, 5)


@contextmanager
def _observed(world: World) -> Iterator[None]:
    """Let the history see what instances and tables do, and failpoints kill."""
    access, admit, create, swap = Instance.access, Functions.admit, Functions.create, Driver.swap
    remove = Functions.remove

    def observed_access(self, sequencer, sequence, *rest):
        world.history.accessed(self, sequencer, sequence)
        return access(self, sequencer, sequence, *rest)

    def observed_admit(self, driver, function, generation, *rest):
        admitted = admit(self, driver, function, generation, *rest)
        if isinstance(admitted, tuple):
            world.history.admitted(admitted[0], generation)
        return admitted

    def observed_create(self, request):
        before = self.instances()
        instance = create(self, request)
        if not any(instance is each for each in before):
            world.history.created(instance, fresh=request.fresh)
        return instance

    def observed_remove(self, instance):
        world.history.removed(instance)
        remove(self, instance)

    def observed_swap(self, table):
        swap(self, table)
        world.history.table_swapped(self, LIFE.get().name)

    with ExitStack() as patches:
        for target, name, replacement in (
            (Instance, "access", observed_access),
            (Functions, "admit", observed_admit),
            (Functions, "create", observed_create),
            (Functions, "remove", observed_remove),
            (Driver, "swap", observed_swap),
            (failpoint, "_directory", "simulated"),
            (failpoint, "_reach", world.reached),
        ):
            patches.enter_context(mock.patch.object(target, name, replacement))
        yield


def simulate(seed: int, *, verbose: bool = False, accelerated: bool = False) -> Outcome:
    """Do the run of a seed; with an accelerator at work beside the checkers, if so asked."""
    logging.disable(logging.CRITICAL)
    gc.disable()
    # What is there already is not this run's to sweep.
    gc.freeze()
    try:
        return _run(World(seed, verbose=verbose, accelerated=accelerated), seed)
    finally:
        _sweep()
        logging.disable(logging.NOTSET)


def _run(world: World, seed: int) -> Outcome:
    with _observed(world):
        try:
            world.loop.run(world.run())
        except StuckError as stuck:
            world.history.violate(7, str(stuck))
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
    history = world.history
    return Outcome(
        seed, tuple(history.violations), dict(history.hits), world.digest, world.loop.callbacks, tuple(world.lines)
    )


def _sweep() -> None:
    """Free what a run leaves. Its processes end in the middle of things, and what they say of that is nothing."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            gc.enable()
            # What a finalizer lets go of is the next round's.
            for _ in range(SWEEPS):
                if not gc.collect():
                    break
    finally:
        gc.unfreeze()
        sys.unraisablehook = hook
