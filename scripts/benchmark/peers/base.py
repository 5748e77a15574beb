"""What an adapter gives, and the roles that are the same for all: producer, consumer, pinger, echo.

Every role is a process of its own, forked from the measuring process after `open`. Libraries with threads are started
in the roles. A transport that has processes of its own (uPipe's pipes, Ray, dora) overrides `run_<kind>`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from benchmark import kinds, roles
from benchmark.model import Outcome, Unsupported, Work
from benchmark.tally import Source, Tally

Array = NDArray[np.uint8]


def forever(get: Callable[[], Any]) -> Iterator[Any]:
    """What get() returns, again and again (iter(get, None) compares each value, which numpy arrays do not like)."""
    while True:
        yield get()


class Sender:
    """The producing end of one channel."""

    def put(self, value: int) -> None:
        """One small value."""
        raise NotImplementedError

    def put_all(self, values: range) -> None:
        """Small values, in the loop its user would write."""
        put = self.put
        for value in values:
            put(value)

    def put_frames(self, source: Source, n: int) -> None:
        """n frames, each stamped with its number."""
        for number in range(n):
            self.put_frame(source.stamp(number))

    def put_frame(self, frame: Array) -> None:
        raise NotImplementedError

    def flush(self) -> None:
        """Everything is on its way."""

    def close(self) -> None:
        """Called once the other end has everything."""


class Receiver:
    """The consuming end of one channel. Raises TimeoutError when nothing came for tally.PATIENCE seconds, if it can."""

    def get(self) -> int:
        raise NotImplementedError

    def values(self) -> Iterator[int]:
        """Small values, without a Python call per value where the library allows it."""
        return iter(self.get, None)

    def frames(self) -> Iterator[Array]:
        """Frames as arrays of bytes; one is released when the next is asked for."""
        raise NotImplementedError

    def batches(self) -> Iterable[Any] | None:
        """Lists or arrays of small values, for interfaces that move many; None: this one does not."""
        return None

    def close(self) -> None: ...


class Transport:
    """One way to move values between processes."""

    fan: ClassVar[str] = "copies"
    """Fan-out: "copies" puts into one channel per consumer, "native" into channel 0, which all receivers read."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def open(self, work: Work, channels: int) -> None:
        """In the parent, before the roles are forked."""

    def close(self) -> None:
        """In the parent, after they ended."""

    def sender(self, work: Work, channel: int = 0) -> Sender:
        raise Unsupported

    def receiver(self, work: Work, channel: int = 0) -> Receiver:
        raise Unsupported

    # ------------------------------------------------------------------ what a producer and a consumer do

    def produce(self, work: Work, gate: roles.Gate, channel: int = 0) -> dict[str, float]:
        sender = self.sender(work, channel)
        source = Source(work.size, work.shape) if work.frames else None
        with gate:
            if source is None:
                sender.put_all(range(work.n + work.warm))
            else:
                sender.put_frames(source, work.n + work.warm)
            sender.flush()
        sender.close()
        return {}

    def consume(self, work: Work, gate: roles.Gate, channel: int = 0) -> dict[str, float]:
        receiver = self.receiver(work, channel)
        tally = Tally(work.n, work.warm)
        source = Source(work.size, work.shape) if work.frames else None
        with gate:
            if source is not None:
                tally.frames(receiver.frames(), source, work.touch, copy=self.views(work) and not work.in_place)
            elif (batches := receiver.batches()) is not None:
                tally.batches(batches)
            else:
                tally.values(receiver.values())
        receiver.close()
        return {"rate": tally.rate, "arrived": tally.arrived, "bad": tally.bad}

    def views(self, work: Work) -> bool:
        """Does `frames()` hand out views into shared memory (then a copying consumer copies)?"""
        return False

    def ping(self, work: Work, gate: roles.Gate) -> dict[str, Any]:
        sender, receiver = self.sender(work, 0), self.receiver(work, 1)
        with gate:
            result = roles.ping(sender.put, receiver.get, work)
        sender.close()
        receiver.close()
        return result

    def echo(self, work: Work, gate: roles.Gate) -> dict[str, Any]:
        receiver, sender = self.receiver(work, 0), self.sender(work, 1)
        with gate:
            roles.echo(receiver.get, sender.put, work)
        sender.close()
        receiver.close()
        return {}

    # ------------------------------------------------------------------ kinds of work

    def run(self, work: Work) -> Outcome:
        """Do it, in processes of its own."""
        method = getattr(self, f"run_{work.kind}", None)
        if method is None:
            raise Unsupported
        outcome: Outcome = method(work)
        return outcome

    def run_stream(self, work: Work) -> Outcome:
        with self.opened(work, 1):
            first, second = roles.together(work, [self.produce, self.consume])
        total = work.n + work.warm
        cpu = (first["cpu"] + second["cpu"]) / total * 1e6
        return Outcome(second["rate"], total, second["arrived"], second["bad"], cpu)

    def run_frames(self, work: Work) -> Outcome:
        """In GB/s."""
        outcome = self.run_stream(work)
        outcome.value *= work.size / 1e9
        return outcome

    def run_across(self, work: Work) -> Outcome:
        """Small values between two hosts, per second."""
        return self.run_stream(work)

    def run_across_frames(self, work: Work) -> Outcome:
        """Frames between two hosts, in GB/s."""
        return self.run_frames(work)

    def run_payload(self, work: Work) -> Outcome:
        """In frames/s."""
        return self.run_stream(work)

    def run_rtt(self, work: Work) -> Outcome:
        with self.opened(work, 2):
            first, _ = roles.together(work, [self.ping, self.echo])
        return roles.percentiles(first, work)

    def run_fanout(self, work: Work) -> Outcome:
        """Values per second that every consumer got."""
        native = self.fan == "native"
        with self.opened(work, 1 if native else work.consumers):
            found = roles.together(
                work,
                [self._produce_fan, *([self.consume] * work.consumers)],
                [0, *((0 if native else number) for number in range(work.consumers))],
            )
        total = (work.n + work.warm) * work.consumers
        return Outcome(
            min(one["rate"] for one in found[1:]),
            total,
            sum(one["arrived"] for one in found[1:]),
            sum(one["bad"] for one in found[1:]),
            sum(one["cpu"] for one in found) / total * 1e6,
        )

    def _produce_fan(self, work: Work, gate: roles.Gate, channel: int = 0) -> dict[str, float]:
        if self.fan == "native":
            return self.produce(work, gate, 0)
        senders = [self.sender(work, number) for number in range(work.consumers)]
        puts = [sender.put for sender in senders]
        with gate:
            for value in range(work.n + work.warm):
                for put in puts:
                    put(value)
            for sender in senders:
                sender.flush()
        for sender in senders:
            sender.close()
        return {}

    def run_mpmc(self, work: Work) -> Outcome:
        return kinds.mpmc(self, work)

    def run_chain(self, work: Work) -> Outcome:
        return kinds.chain(self, work)

    def run_idle(self, work: Work) -> Outcome:
        return kinds.idle(self, work)

    def run_among(self, work: Work) -> Outcome:
        return kinds.among(self, work)

    def opened(self, work: Work, channels: int) -> roles.Opened:
        return roles.Opened(self, work, channels)
