"""A worker's ends of its queues: Inputs (fair over several) and Outputs (all or nothing over several).

Both have a non-blocking try as the real operation; the blocking and the awaited forms wait around it.
"""

from __future__ import annotations

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
        """Those that have not ended."""
        self.sources = dict(zip(rings, sources, strict=True))
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
        if len(rings) == 1 and not self.covering and not self.draining:
            self.last = ring = rings[0]
            found: tuple[bool, Any] | None = ring.receive(0.0)
            if found is not None:
                return found
            rings.clear()
        return self._try_each()

    def _try_each(self) -> tuple[bool, Any]:
        if not self.covering:
            self.finish()
        if self.draining:
            raise Ended("this worker drains")
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

    def receive(self, timeout: float | None = None) -> Any:
        """Wait for a value.

        Raises:
            TimeoutError, EndOfStream, FrameError.
        """
        if len(self.rings) == 1 and not self.covering and not self.draining:
            self.last = ring = self.rings[0]
            found = ring.receive(FOREVER if timeout is None else timeout)
            if found is not None and found[0]:
                return found[1]
            if found is not None and not ring.interrupted:
                raise TimeoutError(f"no frame came within {timeout:g} s")
        waiting = BlockingWait(tuple(self.rings), CONSUMER, timeout)
        try:
            while True:
                found = self.try_receive()
                if found[0]:
                    return found[1]
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
        waiting = AsyncWait(tuple(self.rings), CONSUMER)
        try:
            while await waiting.sleep(_left(deadline)):
                found = self.try_receive()
                if found[0]:
                    return found[1]
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
        for ring in self.sources:
            ring.interrupted = True
            ring.bell(CONSUMER).ring_self()

    def close(self) -> None:
        """Finish what is held and leave all queues."""
        self.finish()
        for ring in self.sources:
            ring.close()


class Output:
    """One edge out: its queue, or one queue per partition."""

    def __init__(self, plan: OutputPlan, rings: tuple[Ring, ...], key: KeyFunction | None) -> None:
        self.target = plan.target
        self.producer = plan.producer
        self.rings = rings
        self.key = key

    def choose(self, value: Any) -> tuple[Ring, int]:
        """The queue for a value, and the hash of its key (0 without keys)."""
        if self.key is None:
            return self.rings[0], 0
        key: Hashable = self.key(value)
        hashed = key_hash(key)
        return self.rings[hashed % len(self.rings)], hashed


class Outputs:
    """All edges out of a worker (or of the pipe). Every emit reaches each of them, or none.

    Args:
        edges: of this emitter.
        replies: where what answers a call goes, instead of to the pipe's sink.
        inputs: while a frame of these is in hand, a worker that drains may still emit.
    """

    def __init__(self, edges: tuple[Output, ...], replies: Ring | None, inputs: Inputs | None = None) -> None:
        self.edges = edges
        self.replies = replies
        self.inputs = inputs
        self.draining = False
        plain = len(edges) == 1 and edges[0].key is None
        self.only: Ring | None = edges[0].rings[0] if plain else None
        """The queue of the commonest case: one edge without key."""
        self._single = self.only if plain and edges[0].target else None
        """The same when the pipe is not at its end, so that calls need no other way."""

    def try_send(self, value: Any, dtype: int = -1, execution: int = 0, to: str | None = None) -> bool:
        """True when the value is in every queue it belongs to; False without room."""
        if self.draining:
            self._drain()
        if self._single is not None and to is None:
            return bool(self._single.send(value, dtype, 0.0, execution))
        if execution == 0 and self.only is not None and to is None:
            return bool(self.only.send(value, dtype))
        rings, keys = self._route(value, execution, to)
        return fan_send(rings, value, dtype, execution, keys) if rings else True

    def _drain(self) -> None:
        if self.inputs is None or self.inputs.held is None:
            raise Ended("it drains: nothing more is taken from it")
        for ring in self.rings():
            ring.interrupted = False  # what belongs to the frame in hand still goes out, and waits for room

    def _route(self, value: Any, execution: int, to: str | None) -> tuple[tuple[Ring, ...], tuple[int, ...]]:
        chosen = []
        for edge in self.edges:
            if to is not None and edge.target != to:
                continue
            if execution and not edge.target and self.replies is not None:
                chosen.append((self.replies, 0))  # the end of a call: to its caller, not to the sink
            else:
                chosen.append(edge.choose(value))
        if to is not None and not chosen:
            known = ", ".join(repr(edge.target) for edge in self.edges if edge.target) or "none"
            raise ValueError(f"no edge leads to {to!r}; edges lead to: {known}")
        return tuple(ring for ring, _ in chosen), tuple(key for _, key in chosen)

    def send(
        self, value: Any, dtype: int = -1, execution: int = 0, timeout: float | None = None, to: str | None = None
    ) -> bool:
        """Wait for room up to `timeout` seconds (None: for ever). False when there was none."""
        if self.try_send(value, dtype, execution, to):
            return True
        single = self._single or (self.only if execution == 0 else None)
        if single is not None and to is None:
            if single.send(value, dtype, FOREVER if timeout is None else timeout, execution):
                return True
            if not self.draining:
                return False
        waiting = BlockingWait(self._route(value, execution, to)[0], PRODUCER, timeout)
        try:
            while waiting.sleep():
                if self.try_send(value, dtype, execution, to):
                    return True
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
        waiting = AsyncWait(self._route(value, execution, to)[0], PRODUCER)
        try:
            while await waiting.sleep(_left(deadline)):
                if self.try_send(value, dtype, execution, to):
                    return True
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
        for ring in self.rings():
            ring.interrupted = True
            ring.bell(PRODUCER).ring_self()

    def close(self, reply_producer: int | None = None) -> None:
        """Close this producer's end of stream on every queue and leave."""
        for edge in self.edges:
            for ring in edge.rings:
                ring.close_producer(edge.producer)
                ring.close()
        if self.replies is not None:
            if reply_producer is not None:
                self.replies.close_producer(reply_producer)
            self.replies.close()
