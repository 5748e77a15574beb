"""What a pipe did: frozen snapshots, from the counters in the queues, and the balance of the books."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from upipe.memq.stats import QueueStats


class EdgeReport(msgspec.Struct, frozen=True, kw_only=True):
    """One edge; the queues of a keyed edge are added up. Counts are frames."""

    source: str
    """Processor that emits; "" = the pipe itself, "*" = all ends."""
    target: str
    """Processor that receives; "" = the pipe itself."""
    emitted: int
    finished: int
    dead: int
    dropped: int
    """By the edge's policy, waiting or on arrival, and what nobody was left to read."""
    aborted: int
    """Padding left by writers that died; never counted as emitted."""
    in_flight: int
    """Neither finished nor ended otherwise."""
    bytes: int
    """Payload bytes emitted."""
    depth: int
    """Ring bytes in use."""
    max_depth: int
    capacity: int
    """Ring bytes."""
    redelivered: int
    """Times a frame was given again."""
    seconds: float

    @property
    def balanced(self) -> bool:
        """emitted = finished + dead + dropped + in flight."""
        return self.emitted == self.finished + self.dead + self.dropped + self.in_flight

    @property
    def rate(self) -> float:
        """Frames emitted per second of the run."""
        return self.emitted / self.seconds if self.seconds > 0 else 0.0

    @property
    def mb_s(self) -> float:
        """Payload megabytes (1e6 bytes) emitted per second of the run."""
        return self.bytes / 1e6 / self.seconds if self.seconds > 0 else 0.0


class ProcessorReport(msgspec.Struct, frozen=True, kw_only=True):
    """One processor, all its workers together."""

    name: str
    workers: int
    """Workers that run now; at the end, the most that were declared."""
    frames_in: int
    """Frames finished or buried by it."""
    frames_out: int
    """Frames it emitted; with several edges out, on the busiest."""
    bytes_in: int
    bytes_out: int
    restarts: int
    redeliveries: int
    dead_letters: int
    cpu_seconds: float
    """User and system time of workers that ended."""


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A pipe at one moment, or at its end."""

    pipe: str
    state: str
    seconds: float
    """Since start."""
    processors: tuple[ProcessorReport, ...]
    edges: tuple[EdgeReport, ...]
    dead_letters: int

    @property
    def balanced(self) -> bool:
        """Whether the books of every edge balance; at completion nothing is in flight either."""
        ended = self.state == "completed"
        return all(edge.balanced and not (ended and edge.in_flight and edge.target) for edge in self.edges)

    def __str__(self) -> str:
        books = "balanced" if self.balanced else "NOT BALANCED"
        lines = [f"pipe {self.pipe}: {self.state} after {self.seconds:.2f} s, books {books}"]
        lines += [
            f"  {one.source or 'pipe'} -> {one.target or 'pipe'}: {one.emitted} emitted = {one.finished} finished + "
            f"{one.dead} dead + {one.dropped} dropped + {one.in_flight} in flight "
            f"({one.rate:,.0f}/s, {one.mb_s:,.1f} MB/s)"
            for one in self.edges
        ]
        lines += [
            f"  {one.name}: {one.frames_in} in, {one.frames_out} out, {one.restarts} restarts, "
            f"{one.dead_letters} dead letters"
            for one in self.processors
        ]
        return "\n".join(lines)


def edge_report(source: str, target: str, queues: Iterable[QueueStats], seconds: float) -> EdgeReport:
    """Add up the queues of one edge."""
    all_ = list(queues)
    return EdgeReport(
        source=source,
        target=target,
        emitted=sum(one.emitted for one in all_),
        finished=sum(one.finished for one in all_),
        dead=sum(one.dead for one in all_),
        dropped=sum(one.lost_to_policy for one in all_),
        aborted=sum(one.aborted for one in all_),
        in_flight=sum(one.in_flight for one in all_),
        bytes=sum(one.bytes for one in all_),
        depth=sum(one.depth for one in all_),
        max_depth=max(one.max_depth for one in all_),
        capacity=sum(one.capacity for one in all_),
        redelivered=sum(one.redelivered for one in all_),
        seconds=seconds,
    )
