"""Ray: shared-memory channels between two actors, calls of an actor, and a compiled graph for the chain.

One ray.init per measuring process (2 CPUs, a small object store, no dashboard). A channel's reader gets a view; the
next read waits until it is gone.
"""

from __future__ import annotations

import atexit
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray

from benchmark import roles
from benchmark.model import MIB, Outcome, Work
from benchmark.peers.base import Transport, forever
from benchmark.tally import Source, Tally


def start_ray() -> None:
    if not ray.is_initialized():
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=700 * MIB,
            log_to_driver=False,
            logging_level="ERROR",
            _temp_dir=tempfile.gettempdir(),
        )
        atexit.register(ray.shutdown)


@ray.remote(num_cpus=0)
class End:
    """One end, a process of its own."""

    def node(self) -> str:
        found: str = ray.get_runtime_context().get_node_id()
        return found

    def pid(self) -> int:
        return os.getpid()

    def channel(self, reader: Any, node: str, size: int, slots: int) -> Any:
        """A channel that this end writes."""
        from ray.experimental.channel.shared_memory_channel import BufferedSharedMemoryChannel, Channel

        mine = ray.get_runtime_context().current_actor
        if slots == 1:
            return Channel(mine, [(reader, node)], size)
        return BufferedSharedMemoryChannel(mine, [(reader, node)], slots, size)

    def produce(self, work: Work, channel: Any) -> float:
        channel.ensure_registered_as_writer()
        began, write = time.process_time(), channel.write
        if work.frames:
            source = Source(work.size, work.shape)
            for number in range(work.n + work.warm):
                write(source.stamp(number))
        else:
            for value in range(work.n + work.warm):
                write(value)
        return time.process_time() - began

    def consume(self, work: Work, channel: Any) -> dict[str, float]:
        channel.ensure_registered_as_reader()
        return self._count(work, forever(channel.read))

    def _count(self, work: Work, values: Iterator[Any]) -> dict[str, float]:
        tally, began = Tally(work.n, work.warm), time.process_time()
        if work.frames:
            tally.frames(values, Source(work.size, work.shape), work.touch, copy=not work.in_place)
        else:
            tally.values(values)
        return {"rate": tally.rate, "arrived": tally.arrived, "bad": tally.bad, "cpu": time.process_time() - began}

    def ping(self, work: Work, there: Any, back: Any) -> dict[str, Any]:
        roles.pin(work, 0)
        there.ensure_registered_as_writer()
        back.ensure_registered_as_reader()
        return roles.ping(there.write, back.read, work)

    def echo(self, work: Work, there: Any, back: Any) -> None:
        roles.pin(work, 1)
        there.ensure_registered_as_reader()
        back.ensure_registered_as_writer()
        roles.echo(there.read, back.write, work)

    # ------------------------------------------------------------------ calls

    def begin(self, work: Work) -> None:
        roles.pin(work, 1)
        self.work, self.tally, self.expected = work, Tally(work.n, work.warm), 0
        self.source = Source(work.size, work.shape) if work.frames else None

    def take(self, value: Any) -> int:
        """One value, as the argument of a call."""
        if self.expected == self.work.warm:
            self.tally.started = time.perf_counter()
        number = value
        if self.source is not None:
            words = value.reshape(-1).view(np.uint64)
            words = words if self.work.in_place else words.copy()
            number = int(words[0])
            self.tally.bad += not self.source.intact(words, self.work.touch)
        self.tally.bad += number != self.expected
        self.expected += 1
        return int(number)

    def call_all(self, work: Work, other: Any) -> None:
        """Call take() of the other end for everything, with some calls on the way."""
        source = Source(work.size, work.shape) if work.frames else None
        most = min(1000, max(2, work.slots))
        waiting: list[Any] = []
        for value in range(work.n + work.warm):
            waiting.append(other.take.remote(value if source is None else source.stamp(value)))
            if len(waiting) >= most:
                ray.get(waiting[: most // 2])
                del waiting[: most // 2]
        ray.get(waiting)

    def found(self) -> dict[str, float]:
        self.tally.ended = time.perf_counter()
        self.tally.arrived = self.expected
        return {"rate": self.tally.rate, "arrived": self.expected, "bad": self.tally.bad}

    def ping_calls(self, work: Work, other: Any) -> dict[str, Any]:
        roles.pin(work, 0)
        reply: list[Any] = []
        return roles.ping(lambda value: reply.append(other.take.remote(value)), lambda: int(ray.get(reply.pop())), work)

    def forward(self, value: int) -> int:
        return value


class RayBase(Transport):
    """Two ends; killed at the end of each work."""

    def _ends(self, n: int = 2) -> list[Any]:
        start_ray()
        ends = [End.remote() for _ in range(n)]
        self.node = ray.get([one.node.remote() for one in ends])[0]
        self.pids = ray.get([one.pid.remote() for one in ends])
        return ends

    def _end(self, ends: list[Any]) -> None:
        """Kill them, and remove the semaphores of their channels: Ray leaves those of a killed actor in /dev/shm."""
        for end in ends:
            ray.kill(end)
        for pid in self.pids:
            for left in Path("/dev/shm").glob(f"sem.*{pid}-*"):
                left.unlink(missing_ok=True)

    def _outcome(self, work: Work, found: dict[str, float], cpu: float) -> Outcome:
        total = work.n + work.warm
        scale = work.size / 1e9 if work.kind == "frames" else 1.0
        return Outcome(found["rate"] * scale, total, int(found["arrived"]), int(found["bad"]), cpu / total * 1e6)


class Channels(RayBase):
    """Option slots: of a buffered channel."""

    def _slots(self, work: Work) -> int:
        wanted = int(self.options.get("slots", 1))
        return 1 if wanted == 1 else max(2, min(wanted if not work.frames else 4, work.slots))

    def run_stream(self, work: Work) -> Outcome:
        one, other = ends = self._ends()
        try:
            size = work.size + 4096
            channel = ray.get(one.channel.remote(other, self.node, size, self._slots(work)))
            reading, writing = other.consume.remote(work, channel), one.produce.remote(work, channel)
            found, cpu = ray.get([reading, writing])
            return self._outcome(work, found, cpu + found["cpu"])
        finally:
            self._end(ends)

    run_frames = run_stream

    def run_rtt(self, work: Work) -> Outcome:
        one, other = ends = self._ends()
        try:
            there = ray.get(one.channel.remote(other, self.node, 4096, 1))
            back = ray.get(other.channel.remote(one, self.node, 4096, 1))
            other.echo.remote(work, there, back)
            return roles.percentiles(ray.get(one.ping.remote(work, there, back)), work)
        finally:
            self._end(ends)


class Calls(RayBase):
    """Calls of an actor."""

    def run_stream(self, work: Work) -> Outcome:
        one, other = ends = self._ends()
        try:
            ray.get(other.begin.remote(work))
            ray.get(one.call_all.remote(work, other))
            return self._outcome(work, ray.get(other.found.remote()), 0.0)
        finally:
            self._end(ends)

    run_frames = run_stream

    def run_rtt(self, work: Work) -> Outcome:
        one, other = ends = self._ends()
        try:
            ray.get(other.begin.remote(work))
            return roles.percentiles(ray.get(one.ping_calls.remote(work, other)), work)
        finally:
            self._end(ends)

    def run_start(self, work: Work) -> Outcome:
        """From nothing: Ray's daemons, two actors, one value."""
        ray.shutdown()
        before = time.perf_counter()
        start_ray()
        initialised = time.perf_counter()
        one, other = ends = self._ends()
        trip = Work("start", "stream", n=1)
        ray.get(other.begin.remote(trip))
        ray.get(one.call_all.remote(trip, other))
        now = time.perf_counter()
        self._end(ends)
        return Outcome((now - before) * 1000, 1, 1, extra={"without init": (now - initialised) * 1000})


class Graph(RayBase):
    """A compiled graph of actors in a row."""

    def run_chain(self, work: Work) -> Outcome:
        from ray.dag import InputNode

        ends = self._ends(work.count)
        with InputNode() as node:
            for end in ends:
                node = end.forward.bind(node)
        graph = node.experimental_compile()
        trips: list[Any] = []
        found = roles.ping(lambda value: trips.append(graph.execute(value)), lambda: int(ray.get(trips.pop())), work)
        return roles.percentiles(found, work)  # no teardown: it hung with frames, and the process ends anyway
