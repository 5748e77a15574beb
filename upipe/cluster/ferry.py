"""The ferry of one pipe on one node: its mirrors, what they may tell (the gate), and how its queues stand.

    release(plan) -> the keeper follows the plan -> follow(plan, labels) -> states(), infos() whenever asked

It owns handles of the pipe's queues on this node, and nothing else: after kill -9 the queues stand as they are, and
the next ferry goes on by position. No task, no polling: it runs in callbacks of the event loop, when a queue was
finished further, a mirror got further, or a plan came.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import msgspec

from upipe.cluster import wire
from upipe.cluster.dealings import QueueState
from upipe.cluster.gate import Gate, Tail
from upipe.cluster.layout import MirrorPlan, NodePlan, QueueHere
from upipe.cluster.lines import Lines
from upipe.cluster.mirror import Mirror, MirrorSink, MirrorSource
from upipe.cluster.mirror_end import AGAIN
from upipe.cluster.mirror_state import Failed
from upipe.cluster.passages import NONE, passages
from upipe.cluster.stations import CALM, Calm, Fault, Station, come, state, told
from upipe.cluster.tail_watch import GLANCE, STEP, TailWatch
from upipe.errors import MirrorRefused, UpipeError
from upipe.memq.queue import MemQ

SOURCE_COPY = 1
"""MemQ.mirror[0] of a queue that only its mirror reads."""

log = logging.getLogger("upipe.cluster")


class Ferry:
    """Moves the frames of one pipe from and to this node.

    Args:
        node: own id.
        pipe: id of this run of the pipe.
        lines: connections to other nodes; the ferry gives it mirrors, and takes them back.
        on_change: states() or infos() may say something else; at once after quiet, and every CALM seconds while
            frames flow. Not called for a producer that closes: whoever ended it knows.
    """

    def __init__(self, node: str, pipe: str, lines: Lines, on_change: Callable[[], None]) -> None:
        self.node = node
        self.pipe = pipe
        self._lines = lines
        self._news = Calm(on_change)
        self._loop = asyncio.get_running_loop()
        self._plan: NodePlan | None = None
        self._labels: dict[str, str] = {}
        self._stations: dict[str, Station] = {}
        self._gate = Gate(())
        self._passages = NONE
        self._looking: asyncio.Handle | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._faults: dict[str, str] = {}
        """Queues that could not be attached, mirrored or watched, with the reason: they are tried again."""
        self._history: dict[str, Fault] = {}
        """Their latest faults; a queue that is well again keeps its own until its plan changes."""
        self._trouble = ""
        """Why the gate cannot look, as it was told."""
        self._looks_at = ""
        """The queue that the gate looks at just now."""

    # ------------------------------------------------------------------ plans

    def release(self, plan: NodePlan | None) -> None:
        """Let go of what `plan` has no more, before the keeper follows it: mirrors end, handles close, and a home that
        had a mirror and has none now is read here again. Idempotent."""
        mirrors = _mirrors(plan)
        queues = {queue.plan.name: queue for queue in plan.queues} if plan else {}
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        for name, station in list(self._stations.items()):
            queue = queues.get(name)
            same = queue is not None and queue.role == station.here.role and mirrors.get(name) == station.plan
            if same:
                continue
            stays = queue is not None and queue.role == station.here.role == "home"
            if station.mirror is not None:
                self._lines.drop(station.mirror)
            if stays and station.plan is not None and name not in mirrors:
                self._read_here(station)
            self._leave(name)
        self._history = {
            name: fault
            for name, fault in self._history.items()
            if name in queues and fault.epoch == _epoch(mirrors.get(name))
        }
        if plan is None:
            self._plan, self._passages = None, NONE
            self._gate.rewire(())

    def follow(self, plan: NodePlan, labels: dict[str, str]) -> None:
        """Be as the plan says, after the keeper is.

        Args:
            labels: of the queues of the plan, by name, for MemQ.attach. A queue that is missing there, or cannot be
                attached or mirrored now, is told as "failed" and tried again every AGAIN seconds.
        """
        self.release(plan)
        self._plan, self._labels = plan, labels
        mirrors = _mirrors(plan)
        before, self._faults = self._faults, {}
        for queue in plan.queues:
            name = queue.plan.name
            station = self._stations.get(name)
            if station is not None and (station.label != labels.get(name, "") or name in before):
                self._leave(name)
                station = None
            if station is None:
                self._open(queue, labels.get(name, ""), mirrors.get(name), before.get(name, ""))
            else:
                station.here = queue
        self._rewire(plan)
        self._news.say()
        if self._faults:
            self._try_again()

    def close(self) -> None:
        """Close every handle; the queues stay as they are. Idempotent."""
        for name in list(self._stations):
            self._leave(name)
        self._news.close()
        for timer in (self._looking, self._retry):
            if timer is not None:
                timer.cancel()

    # ------------------------------------------------------------------ what is told

    def states(self) -> dict[str, QueueState]:
        """How every queue of the plan stands, read now; one that could not be attached says nothing good of itself."""
        known = {queue.plan.name: QueueState() for queue in self._plan.queues} if self._plan else {}
        found = {**known, **{name: state(station) for name, station in self._stations.items() if name in known}}
        now = self._loop.time()
        for name, fault in self._history.items():
            if name in found and fault.broken(now):
                told = {"broken": fault.text, "epoch": fault.epoch, "broken_at": fault.position}
                found[name] = msgspec.structs.replace(found[name], **told)
        return found

    def infos(self) -> list[wire.MirrorInfo]:
        """Where every mirror of the plan stands."""
        plans = _mirrors(self._plan)
        return [self._info(plans[name], self._stations.get(name)) for name in plans]

    def _info(self, plan: MirrorPlan, station: Station | None) -> wire.MirrorInfo:
        role, peer = ("source", plan.sink) if plan.source == self.node else ("sink", plan.source)
        mirror = station.mirror if station is not None else None
        if mirror is None:
            why = self._faults.get(plan.queue, "its queue is not there yet")
            return wire.MirrorInfo(self._name(plan), role, plan.epoch, peer, 0, 0, 0, state=f"failed: {why}"[:4096])
        ring, lag = mirror.ring, 0.0
        head = ring.head
        if isinstance(mirror, MirrorSource):
            received, finished = mirror.received, ring.settled()[0]
            written = ring.written(received) if received < head else 0
            lag = max(0.0, time.time() - written / 1e9) if written else 0.0
        else:
            received, finished = head, mirror.machine.known
        state = f"failed, tries again: {self._trouble}" if self._trouble and role == "sink" else mirror.state
        state = state[:4096]
        return wire.MirrorInfo(self._name(plan), role, plan.epoch, peer, head, received, finished, lag, state)

    def _name(self, plan: MirrorPlan) -> str:
        """Of a mirror, on the wire."""
        return f"{self.pipe}:{plan.id}"

    # ------------------------------------------------------------------ stations

    def _open(self, queue: QueueHere, label: str, plan: MirrorPlan | None, before: str) -> None:
        name = queue.plan.name
        try:
            if not label:
                raise LookupError("the keeper has not told of it")
            ring = MemQ.attach(label)
        except (UpipeError, OSError, LookupError) as error:
            self._fault(name, error, before)
            return
        station = self._stations[name] = Station(queue, label, plan, ring)
        try:
            if plan is not None:
                self._mirror(station, plan)
            elif queue.role == "home" and ring.mirror[0] == SOURCE_COPY:  # who ended its mirror did not live to say so
                ring.mirror_local()
        except (UpipeError, OSError, ValueError) as error:
            self._fault(name, error, before)

    def _fault(self, name: str, error: Exception, before: str = "") -> None:
        text = self._faults[name] = str(error) or type(error).__name__
        if text != before:
            log.error("pipe %s: queue %s: %s", self.pipe, name, text)
        self._remember(name, text, come(self._stations.get(name)))

    def _remember(self, name: str, text: str, position: int) -> None:
        plan, now = _mirrors(self._plan).get(name), self._loop.time()
        epoch = _epoch(plan)
        known = self._history.get(name)
        if known is None or not known.goes_on(epoch, position, now):
            self._history[name] = Fault(text, epoch, position, now, now)
        else:
            known.text, known.last = text, now

    def _try_again(self) -> None:
        if self._retry is None and self._plan is not None:
            self._retry = self._loop.call_later(AGAIN, self._follow_again)

    def _follow_again(self) -> None:
        self._retry = None
        if self._plan is None:
            return
        try:
            self.follow(self._plan, self._labels)
        except Exception:  # a bug; it is not the end of trying
            log.exception("pipe %s: its mirrors cannot be set up, and are tried again", self.pipe)
            self._try_again()

    def _mirror(self, station: Station, plan: MirrorPlan) -> None:
        name = self._name(plan)
        mirror: Mirror
        if plan.source == self.node:
            mirror = MirrorSource(station.ring, name, plan.epoch)
            mirror.on_received = lambda _: self._look_if_waiting()
            peer = plan.sink
        else:
            mirror = MirrorSink(station.ring, name, plan.epoch, producer=0, gated=True)
            mirror.on_settled = lambda _: self._moved()
            peer = plan.source
        station.mirror = mirror
        mirror.on_news = self._news.say
        mirror.on_failed = lambda failed: self._failed(station, failed)
        self._lines.carry(mirror, peer, plan.dialer == self.node)

    def _failed(self, station: Station, failed: Failed) -> None:
        """A mirror does not go on by itself: both its ends are opened again, on the same copies."""
        name = station.here.plan.name
        if self._stations.get(name) is not station:
            return  # its plan is over
        known = self._history.get(name)
        self._fault(name, MirrorRefused(failed.code, failed.text), known.text if known is not None else "")
        self._try_again()

    def _read_here(self, station: Station) -> None:
        """Its mirror is over: what was not finished there is read here again."""
        try:
            station.ring.mirror_local()
        except (UpipeError, OSError) as error:  # follow() tries again
            self._fault(station.here.plan.name, error)

    def _leave(self, name: str) -> None:
        station = self._stations.pop(name)
        self._gate.forget([name])
        if station.mirror is not None:
            self._lines.drop(station.mirror)
        station.close()

    # ------------------------------------------------------------------ the gate

    def _rewire(self, plan: NodePlan) -> None:
        self._passages = found = passages(plan)
        self._gate.rewire(found.all)
        for name, station in self._stations.items():
            self._watch(station, name in found.read)
        self._look_soon()

    def _watch(self, station: Station, gated: bool) -> None:
        """A home without mirror is watched by the station: closely where the gate waits for it."""
        if station.mirror is not None or (station.watch is not None and station.gated == gated):
            return
        if station.watch is not None:
            station.watch.close()
        station.gated = gated
        pace = (GLANCE, STEP) if gated else (CALM, 0)

        def failed(error: Exception) -> None:
            station.watch = None
            self._fault(station.here.plan.name, error)
            self._news.say()
            self._try_again()

        try:
            station.watch = TailWatch(station.ring, lambda _: self._moved(gated), failed, *pace)
        except (UpipeError, OSError) as error:
            failed(error)

    def _moved(self, gated: bool = True) -> None:
        if gated:
            self._look_soon()
        self._news.say()

    def _look_if_waiting(self) -> None:
        if self._gate.waits:
            self._look_soon()

    def _look_soon(self) -> None:
        if self._looking is None and self._passages.sinks:
            self._looking = self._loop.call_soon(self._look)

    def _look(self) -> None:
        """Let the sinks tell what has left this node."""
        self._looking, self._looks_at = None, ""
        try:
            self._look_once()
        except Exception as error:
            self._blind(error)
            self._looking = self._loop.call_later(AGAIN, self._look)
        else:
            if self._trouble:
                log.warning("pipe %s: the gate looks again", self.pipe)
            self._trouble = ""

    def _blind(self, error: Exception) -> None:
        """Nothing is told as finished meanwhile. It counts against the queue that it could not look at, or against all
        that wait to tell: what lasts makes them broken, as a mirror that fails does."""
        text = f"{type(error).__name__}: {error}"
        if text != self._trouble:
            known = isinstance(error, UpipeError)
            log.error("pipe %s: the gate cannot look: %s", self.pipe, text, exc_info=None if known else error)
        self._trouble = text
        for name in (self._looks_at,) if self._looks_at else self._passages.sinks:
            if (station := self._stations.get(name)) is not None:
                self._remember(name, f"the gate cannot look: {text}", told(station))

    def _look_once(self) -> None:
        """The order counts: every tail, then every head."""
        stations, found = self._stations, self._passages
        read = [name for name in (*found.sinks, *found.read) if name in stations]
        tails = {name: Tail(*self._ring(name).settled()) for name in read}
        heads = {name: self._ring(name).head if name in stations else NEVER for name in found.fed}
        self._looks_at = ""
        received = {
            name: station.mirror.received
            for name, station in stations.items()
            if isinstance(station.mirror, MirrorSource)
        }
        for name, tail in self._gate.observe(tails, heads, received).items():
            mirror = stations[name].mirror
            if isinstance(mirror, MirrorSink):
                mirror.allow(tail)

    def _ring(self, name: str) -> MemQ:
        """To look at it."""
        self._looks_at = name
        return self._stations[name].ring


NEVER = 1 << 63
"""Head of a queue that could not be attached: what may lie in it has not left."""


def _mirrors(plan: NodePlan | None) -> dict[str, MirrorPlan]:
    """By queue: each has at most one on a node."""
    return {mirror.queue: mirror for mirror in plan.mirrors} if plan else {}


def _epoch(plan: MirrorPlan | None) -> int:
    return plan.epoch if plan is not None else 0
