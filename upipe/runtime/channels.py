"""A worker's ends of its queues: Inputs (fair over several) and Outputs (all or nothing over several).

Both have a non-blocking try as the real operation; the blocking and the awaited forms wait around it.

On a cluster the queues change while the worker runs. Another thread (the worker's control thread) hands the new ones
over with rewire() and wakes whoever sleeps; the thread that receives or emits takes them at its next try. So nothing is
changed under a loop that runs over it, and a try that finds nothing to attend to pays for one look at a flag.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from typing import Any

from upipe.errors import EndOfStream
from upipe.graph.plan import OutputPlan
from upipe.memq._ring import Ring, fan_send
from upipe.memq.wakeup import AsyncWait, lull
from upipe.runtime.waits import CONSUMER, PRODUCER, BlockingWait
from upipe.runtime.worker_state import KeyFunction, key_hash

NOTHING = (False, None)
FOREVER = 1e18
"""Seconds, for the ring's own waits."""
SPINS = 64
"""Tries before a task sleeps for a frame: some microseconds, where a sleep and its wake cost the two sides thirty."""

LEAD = 4096
"""Bytes by which the backlog of a local queue may be longer than that of another node's before frames go there: some
dozens of small frames, one large one. Longer spares the network, and lets the readers elsewhere idle."""


class Ended(EndOfStream):
    """This worker shall end now: it drains. Ends it cleanly, like any EndOfStream that escapes."""


def _deadline(timeout: float | None) -> float | None:
    return None if timeout is None else time.monotonic() + timeout


def _left(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


class Inputs:
    """The queues a worker reads. A frame is held until the next one is asked for, or finish()."""

    def __init__(self, rings: tuple[Ring, ...], sources: tuple[str, ...]) -> None:
        self.rings = list(rings)
        """Those that have not ended. Another list after a rewire, so that who waits sees it."""
        self.sources = dict(zip(rings, sources, strict=True))
        self.attention = False
        """It drains, or other queues were handed over: the next try looks."""
        self._known = dict(self.sources)
        """As the control thread handed them over; written and read by it alone."""
        self._handed: dict[Ring, str] | None = None
        self._left: list[Ring] = []
        """Not read any more; who waits on them may still have to leave."""
        self.last: Any = None
        """The Ring that was read last; it holds the frame in hand, if there is one."""
        self.draining = False
        self.covering = False
        """With checkpoints: a frame is not finished when the next is asked for; the checkpoint does it."""
        self.before_sleep: Callable[[], None] = lambda: None
        """Called when there is nothing to take: what is done is saved, so that an idle worker holds nothing back."""
        self._turn = 0
        self._spins = SPINS

    @property
    def held(self) -> Ring | None:
        """The queue that the frame in hand came from, None when there is none."""
        last: Ring | None = self.last
        return last if last is not None and last.holding is not None else None

    def try_receive(self) -> tuple[bool, Any]:
        """(True, value), or (False, None) when nothing is there. Finishes the frame held before.

        Raises:
            EndOfStream: every input ended. FrameError: the frame that is held now cannot be read.
        """
        rings = self.rings
        if len(rings) == 1 and not self.covering and not self.attention:
            self.last = ring = rings[0]
            found: tuple[bool, Any] | None = ring.receive(0.0)
            if found is not None:
                return found
            rings.clear()
        return self._try_each()

    def _try_each(self) -> tuple[bool, Any]:
        if not self.covering:
            self.finish()
        if self.attention:
            self._attend()
        for _ in range(len(self.rings)):
            self._turn = (self._turn + 1) % len(self.rings)  # the next one first: fair over the inputs
            self.last = ring = self.rings[self._turn]
            found: tuple[bool, Any] | None = ring.receive(0.0)
            if found is None:
                del self.rings[self._turn]
                self._turn -= 1
            elif found[0]:
                return found
        if not self.rings:
            raise EndOfStream("every input of this worker has ended")
        self.before_sleep()
        return NOTHING

    def _attend(self) -> None:
        """Take the queues that were handed over. A drain comes after: what is here now is known to close()."""
        self.attention = False
        for ring in self.sources:
            ring.interrupted = False  # before the look, so that what is handed over after it interrupts again
        handed, self._handed = self._handed, None
        if handed is not None:
            self._adopt(handed)
        if self.draining:
            self.attention = True
            raise Ended("this worker drains")

    def _adopt(self, handed: dict[Ring, str]) -> None:
        for ring in self._left:
            ring.close()
        self._left = [ring for ring in self.sources if ring not in handed]
        rings = [ring for ring in self.rings if ring in handed]
        self.rings = [*rings, *(ring for ring in handed if ring not in self.sources)]
        self.sources = handed
        self._turn = 0

    def rewire(self, rings: dict[Ring, str]) -> None:
        """From the control thread: read these from now on, by source. Their bells are made.

        A queue that is not among them is left: it is empty and nobody writes into it. The end of one that is new has
        not been seen, so this must come before the others end.
        """
        self._known = {**self._known, **rings}
        self._handed = dict(rings)
        self.attention = True
        self._interrupt()
        self.attention = True  # again: who attended meanwhile has been interrupted for nothing, and clears that
        self._known = dict(rings)

    def receive(self, timeout: float | None = None) -> Any:
        """Wait for a value.

        Raises:
            TimeoutError, EndOfStream, FrameError.
        """
        if len(self.rings) == 1 and not self.covering and not self.attention:
            self.last = ring = self.rings[0]
            found = ring.receive(FOREVER if timeout is None else timeout)
            if found is not None and found[0]:
                return found[1]
            if found is not None and not ring.interrupted:
                raise TimeoutError(f"no frame came within {timeout:g} s")
        rings = self.rings
        waiting = BlockingWait(tuple(rings), CONSUMER, timeout)
        try:
            while True:
                found = self.try_receive()
                if found[0]:
                    return found[1]
                if rings is not self.rings:
                    rings = self.rings
                    waiting.leave()
                    waiting = BlockingWait(tuple(rings), CONSUMER, _left(waiting.deadline))
                if not waiting.sleep():
                    raise TimeoutError(f"no frame came within {timeout:g} s")
        finally:
            waiting.leave()

    async def areceive(self, timeout: float | None = None) -> Any:
        """receive() for asyncio."""
        for tried in range(self._spins):
            found = self.try_receive()
            if found[0]:
                self._spins = min(SPINS, self._spins + tried)
                return found[1]
        self._spins = max(2, self._spins // 2)  # spinning did not help: the producer is slow
        quiet = lull(timeout) if len(self.rings) == 1 and not self.covering and not self.draining else None
        if quiet is not None:
            slept = self.rings[0].receive(*quiet)
            if slept is not None and slept[0]:
                return slept[1]
        deadline = _deadline(timeout)
        rings = self.rings
        waiting = AsyncWait(tuple(rings), CONSUMER)
        try:
            while await waiting.sleep(_left(deadline)):
                found = self.try_receive()
                if found[0]:
                    return found[1]
                if rings is not self.rings:
                    rings = self.rings
                    waiting.leave()
                    waiting = AsyncWait(tuple(rings), CONSUMER)
        finally:
            waiting.leave()
        raise TimeoutError(f"no frame came within {timeout:g} s")

    def finish(self, dead: bool = False) -> None:
        """Finish the frame in hand, if there is one."""
        if self.last is not None:
            self.last.finish(dead)

    def give_back(self) -> None:
        """Give the frame in hand back: it is delivered again."""
        if self.last is not None:
            self.last.give_back()

    def interrupt(self) -> None:
        """From another thread: end waits; the next receive raises EndOfStream."""
        self.draining = True
        self.attention = True
        self._interrupt()

    def _interrupt(self) -> None:
        for ring in self._known:
            ring.interrupted = True
            ring.bell(CONSUMER).ring_self()

    def close(self) -> None:
        """Finish what is held and leave all queues."""
        self.finish()
        for ring in (*self.sources, *self._left):
            ring.close()


class Output:
    """One edge out: its queue; or one queue per partition; or several without keys, of which any will do."""

    def __init__(self, plan: OutputPlan, rings: tuple[Ring, ...], key: KeyFunction | None) -> None:
        self.target = plan.target
        self.producer = plan.producer
        self.rings = rings
        self.key = key
        self.local = plan.local
        self.free = key is None and len(rings) > 1
        """The room decides which queue a frame goes to."""
        self._turn = 0

    def choose(self, value: Any, most: bool = False) -> tuple[Ring, int]:
        """The queue for a value, and the hash of its key (0 without keys). most: the one with most room, wherever."""
        if self.key is None:
            return (self._roomy(most) if self.free else self.rings[0]), 0
        key: Hashable = self.key(value)
        hashed = key_hash(key)
        return self.rings[hashed % len(self.rings)], hashed

    def _roomy(self, most: bool) -> Ring:
        """The one with most room: what waits in it, and what its readers hold, is least. A local queue if that is about
        as good, since its frames need no network; a far one keeps its frames until they are known to be finished, so
        it looks fuller the slower its way is. Of equals another one each time: both have idle readers."""
        self._turn += 1
        best = self._roomiest(self.rings)
        if self.local and not most:
            here = self._roomiest(self.rings[: self.local])
            if here.capacity - here.room <= best.capacity - best.room + LEAD:
                return here
        return best

    def _roomiest(self, rings: tuple[Ring, ...]) -> Ring:
        at = self._turn % len(rings)
        return max((*rings[at:], *rings[:at]), key=_room)


def _room(ring: Ring) -> int:
    return ring.room


class Outputs:
    """All edges out of a worker (or of the pipe). Every emit reaches each of them, or none.

    Args:
        edges: of this emitter.
        replies: where what answers a call goes, instead of to the pipe's sink.
        inputs: while a frame of these is in hand, a worker that drains may still emit.
    """

    def __init__(self, edges: tuple[Output, ...], replies: Ring | None, inputs: Inputs | None = None) -> None:
        self.replies = replies
        self.inputs = inputs
        self.attention = False
        """It drains, or other queues were handed over: the next try looks."""
        self._draining = False
        self._handed: tuple[Output, ...] | None = None
        self._left: list[tuple[Ring, int]] = []
        """Not written any more, with the producer id; closed at the end."""
        self._use(edges)
        self._known = self.rings()
        """As the control thread handed them over; written and read by it alone."""

    def _use(self, edges: tuple[Output, ...]) -> None:
        self.edges = edges
        plain = all(edge.key is None and len(edge.rings) == 1 for edge in edges)
        self.plain: tuple[Ring, ...] = tuple(edge.rings[0] for edge in edges) if plain else ()
        """Where every value goes in the commonest case: each edge has one queue. Else empty."""
        self.only: Ring | None = self.plain[0] if len(self.plain) == 1 else None
        """The queue of the one edge."""
        self._onward = all(edge.target for edge in edges)
        """The pipe does not end here, so that calls need no other way."""
        self._free = any(edge.free for edge in edges)

    @property
    def draining(self) -> bool:
        """Nothing more is taken, but for the frame in hand."""
        return self._draining

    @draining.setter
    def draining(self, value: bool) -> None:
        self._draining = value
        self.attention = self.attention or value

    def try_send(self, value: Any, dtype: int = -1, execution: int = 0, to: str | None = None) -> bool:
        """True when the value is in every queue it belongs to; False without room."""
        if self.attention:
            self._attend()
        if self.plain and to is None and (execution == 0 or self._onward):
            if self.only is not None:
                return bool(self.only.send(value, dtype, 0.0, execution))
            return fan_send(self.plain, value, dtype, execution)
        rings, keys = self._route(value, execution, to)
        if not rings or fan_send(rings, value, dtype, execution, keys):
            return True
        return self._free and self._try_others(rings, value, dtype, execution, to)

    def _try_others(self, rings: tuple[Ring, ...], value: Any, dtype: int, execution: int, to: str | None) -> bool:
        """A local queue had some room, and not enough for this value."""
        others, keys = self._route(value, execution, to, True)
        return others != rings and fan_send(others, value, dtype, execution, keys)

    def _attend(self) -> None:
        """Take the queues that were handed over; then drain, if that was asked for."""
        self.attention = False
        for ring in self.rings():
            ring.interrupted = False  # before the look, so that what is handed over after it interrupts again
        handed, self._handed = self._handed, None
        if handed is not None:
            self._adopt(handed)
        if self._draining:
            self.attention = True
            self._drain()

    def _adopt(self, handed: tuple[Output, ...]) -> None:
        kept = {ring for edge in handed for ring in edge.rings}
        left = [(ring, edge.producer) for edge in self.edges for ring in edge.rings if ring not in kept]
        self._use(handed)
        if threading.active_count() <= 2:  # this and the control thread; else another may be in the middle of an emit,
            for ring, producer in left:  # and its frame must not come after the end: then that waits for close()
                ring.close_producer(producer)
        self._left += left

    def rewire(self, edges: tuple[Output, ...]) -> None:
        """From the control thread: emit into these from now on. Their bells are made."""
        fresh = [ring for edge in edges for ring in edge.rings]
        self._known = [*self._known, *fresh]
        self._handed = edges
        self.attention = True
        self._interrupt()
        self.attention = True  # see Inputs.rewire
        self._known = fresh

    def switch(self, edges: tuple[Output, ...]) -> None:
        """From the event loop that emits (no other thread may): emit into these from now on. The ends of those that are
        left are closed; who waits for room in one of them tries the new ones."""
        before = [(ring, edge.producer) for edge in self.edges for ring in edge.rings]
        self._use(edges)
        self._known = self.rings()
        for ring, producer in before:
            if ring not in self._known:
                ring.close_producer(producer)
            ring.bell(PRODUCER).ring_self()  # who waits there leaves, which wakes the next one

    def _interrupt(self) -> None:
        for ring in self._known:
            ring.interrupted = True
            ring.bell(PRODUCER).ring_self()

    def _drain(self) -> None:
        if self.inputs is None or self.inputs.held is None:
            raise Ended("it drains: nothing more is taken from it")
        for ring in self.rings():
            ring.interrupted = False  # what belongs to the frame in hand still goes out, and waits for room

    def _route(
        self, value: Any, execution: int, to: str | None, most: bool = False
    ) -> tuple[tuple[Ring, ...], tuple[int, ...]]:
        chosen = []
        for edge in self.edges:
            if to is not None and edge.target != to:
                continue
            if execution and not edge.target and self.replies is not None:
                chosen.append((self.replies, 0))  # the end of a call: to its caller, not to the sink
            else:
                chosen.append(edge.choose(value, most))
        if to is not None and not chosen:
            known = ", ".join(repr(edge.target) for edge in self.edges if edge.target) or "none"
            raise ValueError(f"no edge leads to {to!r}; edges lead to: {known}")
        return tuple(ring for ring, _ in chosen), tuple(key for _, key in chosen)

    def _awaited(self, value: Any, execution: int, to: str | None) -> tuple[Ring, ...]:
        """Where room is waited for: in every queue that may take the value."""
        rings = self._route(value, execution, to)[0]
        if not self._free:
            return rings
        more = [ring for edge in self.edges if edge.free and to in (None, edge.target) for ring in edge.rings]
        return tuple(dict.fromkeys((*rings, *more)))

    def send(
        self, value: Any, dtype: int = -1, execution: int = 0, timeout: float | None = None, to: str | None = None
    ) -> bool:
        """Wait for room up to `timeout` seconds (None: for ever). False when there was none."""
        if self.try_send(value, dtype, execution, to):
            return True
        single = self.only if execution == 0 or self._onward else None
        if single is not None and to is None:
            if single.send(value, dtype, FOREVER if timeout is None else timeout, execution):
                return True
            if not self.attention and not single.interrupted:
                return False
        edges = self.edges
        waiting = BlockingWait(self._awaited(value, execution, to), PRODUCER, timeout)
        try:
            while waiting.sleep():
                if self.try_send(value, dtype, execution, to):
                    return True
                if edges is not self.edges:
                    edges = self.edges
                    waiting.leave()
                    waiting = BlockingWait(self._awaited(value, execution, to), PRODUCER, _left(waiting.deadline))
            return False
        finally:
            waiting.leave()

    async def asend(
        self, value: Any, dtype: int = -1, execution: int = 0, timeout: float | None = None, to: str | None = None
    ) -> bool:
        """send() for asyncio."""
        if self.try_send(value, dtype, execution, to):
            return True
        deadline = _deadline(timeout)
        edges = self.edges
        waiting = AsyncWait(self._awaited(value, execution, to), PRODUCER)
        try:
            while await waiting.sleep(_left(deadline)):
                if self.try_send(value, dtype, execution, to):
                    return True
                if edges is not self.edges:
                    edges = self.edges
                    waiting.leave()
                    waiting = AsyncWait(self._awaited(value, execution, to), PRODUCER)
            return self.try_send(value, dtype, execution, to)
        finally:
            waiting.leave()

    def children(self, to: str | None) -> int:
        """Processors that one emit reaches (only `to`, when it is given)."""
        return sum(1 for edge in self.edges if edge.target and to in (None, edge.target))

    def rings(self) -> list[Ring]:
        """Every queue of its edges."""
        return [ring for edge in self.edges for ring in edge.rings]

    def interrupt(self) -> None:
        """From another thread: end waits; the next send raises EndOfStream, unless a frame is in hand."""
        self.draining = True
        self._interrupt()

    def close(self, reply_producer: int | None = None) -> None:
        """Close this producer's end of stream on every queue and leave."""
        ends = [(ring, edge.producer) for edge in self.edges for ring in edge.rings]
        for ring, producer in (*ends, *self._left):
            ring.close_producer(producer)
            ring.close()
        if self.replies is not None:
            if reply_producer is not None:
                self.replies.close_producer(reply_producer)
            self.replies.close()
