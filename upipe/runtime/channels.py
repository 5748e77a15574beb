"""A worker's ends of its queues: Inputs (fair over several) and Outputs (all or nothing over several).

Both have a non-blocking try as the real operation; the blocking and the awaited forms wait around it.
"""

from __future__ import annotations

import select
import time
from collections.abc import Hashable
from typing import Any

from upipe.errors import EndOfStream
from upipe.graph.plan import OutputPlan
from upipe.memq._ring import Ring, fan_send
from upipe.memq.wakeup import AsyncWait
from upipe.runtime.worker_state import KeyFunction, key_hash

NOTHING = (False, None)
REPLY = 2


class Ended(EndOfStream):
    """This worker shall end now: it drains. Ends it cleanly, like any EndOfStream that escapes."""


class BlockingWait:
    """The blocking twin of AsyncWait, over several queues: the first sleep() only arms, so that the caller tries again
    before it sleeps. After the deadline one more try is granted (sleep() is True), then it is False."""

    def __init__(self, rings: tuple[Ring, ...], producer: int, timeout: float | None) -> None:
        self.rings = rings
        self.producer = producer
        self.deadline = None if timeout is None else time.monotonic() + timeout
        self._armed = False
        self._late = False

    def sleep(self) -> bool:
        """True: try again. False: the time is over."""
        if self._late:
            return False
        if not self._armed:
            for ring in self.rings:
                ring.arm(self.producer)
            self._armed = True
            return True
        poll = select.poll()
        for ring in self.rings:
            poll.register(ring.bell(self.producer).fd, select.POLLIN)
        left = None if self.deadline is None else max(0.0, self.deadline - time.monotonic()) * 1000 + 1
        self._late = not poll.poll(left)
        self.leave()
        return True

    def leave(self) -> None:
        """Disarm."""
        if self._armed:
            self._armed = False
            for ring in self.rings:
                ring.bell(self.producer).drain()
                ring.disarm(self.producer)


class Inputs:
    """The queues a worker reads. A frame is held until the next one is asked for, or finish()."""

    def __init__(self, rings: tuple[Ring, ...], sources: tuple[str, ...]) -> None:
        self.rings = list(rings)
        self.sources = dict(zip(rings, sources, strict=True))
        self.held: Ring | None = None
        self.draining = False
        self.covering = False
        """With checkpoints: a frame is not finished when the next is asked for; the checkpoint does it."""
        self._turn = 0

    def try_receive(self) -> tuple[bool, Any]:
        """(True, value), or (False, None) when nothing is there. Finishes the frame held before.

        Raises:
            EndOfStream: every input ended. FrameError: the frame that is held now cannot be read.
        """
        rings = self.rings
        if len(rings) == 1 and not self.covering and not self.draining:
            ring = rings[0]
            self.held = ring
            found = ring.receive(0.0)
            if found is None:
                rings.clear()
                self.held = None
                raise EndOfStream("every input of this worker has ended")
            return found
        return self._try_each()

    def _try_each(self) -> tuple[bool, Any]:
        if not self.covering:
            self.finish()
        if self.draining:
            raise Ended("this worker drains")
        for _ in range(len(self.rings)):
            self._turn = (self._turn + 1) % len(self.rings)  # the next one first: fair over the inputs
            ring = self.rings[self._turn]
            self.held = ring
            found = ring.receive(0.0)
            if found is None:
                self.rings.remove(ring)
                self._turn -= 1
                if not self.rings:
                    break
            elif found[0]:
                return found
        self.held = None
        if not self.rings:
            raise EndOfStream("every input of this worker has ended")
        return NOTHING

    def receive(self, timeout: float | None = None) -> Any:
        """Wait for a value.

        Raises:
            TimeoutError, EndOfStream, FrameError.
        """
        if len(self.rings) == 1 and not self.covering and not self.draining:
            ring = self.rings[0]
            self.held = ring
            found = ring.receive(1e18 if timeout is None else timeout)
            if found is not None and found[0]:
                return found[1]
            if found is not None and not ring.interrupted:
                raise TimeoutError(f"no frame came within {timeout:g} s")
        waiting = BlockingWait(tuple(self.rings), 0, timeout)
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
        found = self.try_receive()
        if found[0]:
            return found[1]
        deadline = None if timeout is None else time.monotonic() + timeout
        waiting = AsyncWait(tuple(self.rings), 0)
        try:
            while await waiting.sleep(None if deadline is None else max(0.0, deadline - time.monotonic())):
                found = self.try_receive()
                if found[0]:
                    return found[1]
        finally:
            waiting.leave()
        raise TimeoutError(f"no frame came within {timeout:g} s")

    def finish(self, dead: bool = False) -> None:
        """Finish the held frame, if there is one."""
        if self.held is not None:
            self.held.finish(dead)
            self.held = None

    def interrupt(self) -> None:
        """From another thread: end waits; the next receive raises EndOfStream."""
        self.draining = True
        for ring in tuple(self.rings):
            ring.interrupted = True
            ring.bell(0).ring_self()

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
    """All edges out of a worker (or of the pipe). Every emit reaches each of them, or none."""

    def __init__(self, edges: tuple[Output, ...], replies: Ring | None) -> None:
        self.edges = edges
        self.replies = replies
        self.draining = False
        plain = len(edges) == 1 and edges[0].key is None
        self._only: Ring | None = edges[0].rings[0] if plain else None
        self._single = self._only if plain and edges[0].target else None
        """The queue of the commonest case: one edge, no key, no pipe at its end, so that calls need no other way."""

    def try_send(self, value: Any, dtype: int = -1, execution: int = 0, to: str | None = None) -> bool:
        """True when the value is in every queue it belongs to; False without room."""
        if self.draining:
            raise Ended("this worker drains: the pipe takes no more from it")
        if self._single is not None and to is None:
            return self._single.send(value, dtype, 0.0, execution)
        if execution == 0 and self._only is not None and to is None:
            return self._only.send(value, dtype)
        rings, keys = self._route(value, execution, to)
        return fan_send(rings, value, dtype, execution, keys) if rings else True

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

    def send(self, value: Any, dtype: int = -1, execution: int = 0, timeout: float | None = None, to: str | None = None) -> bool:
        """Wait for room up to `timeout` seconds (None: for ever). False when there was none."""
        if self.try_send(value, dtype, execution, to):
            return True
        deadline = None if timeout is None else time.monotonic() + timeout
        single = self._single or (self._only if execution == 0 else None)
        if single is not None and to is None:
            while not single.send(value, dtype, 1e18 if timeout is None else timeout, execution):
                if not self.draining:
                    return False
                self.try_send(value, dtype, execution)  # raises Ended
            return True
        waiting = BlockingWait(self._route(value, execution, to)[0], 1, timeout)
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
        deadline = None if timeout is None else time.monotonic() + timeout
        waiting = AsyncWait(self._route(value, execution, to)[0], 1)
        try:
            while await waiting.sleep(None if deadline is None else max(0.0, deadline - time.monotonic())):
                if self.try_send(value, dtype, execution, to):
                    return True
        finally:
            waiting.leave()
        return self.try_send(value, dtype, execution, to)

    def rings(self) -> list[Ring]:
        """Every queue this worker may write to."""
        found = [ring for edge in self.edges for ring in edge.rings]
        return found + ([self.replies] if self.replies is not None else [])

    def interrupt(self) -> None:
        """From another thread: end waits; the next send raises EndOfStream."""
        self.draining = True
        for ring in self.rings():
            ring.interrupted = True
            ring.bell(1).ring_self()

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
