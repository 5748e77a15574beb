"""Counters for Prometheus, taken when they are asked for; a registry of our own, so that nothing else shows.

Labels are bounded: pipes and streams beyond MOST_SERIES of a metric are left out, and counted in
upipe_series_left_out. Names of pipes are their ids: two runs of one pipe are two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from upipe.cluster.messages import NodeInfo
from upipe.cluster.wire import Member, MirrorInfo, PipeInfo

T = TypeVar("T")
MOST_SERIES = 500
"""Of one metric."""


class Metrics(Collector):
    """Reads an agent.

    Args:
        info: of this node.
        members: all nodes it knows.
        pipes: all pipes it knows.
        mirrors: all mirrors that end here.
    """

    def __init__(
        self, info: Callable[[], NodeInfo], members: Callable[[], Iterable[Member]],
        pipes: Callable[[], Iterable[PipeInfo]], mirrors: Callable[[], Iterable[MirrorInfo]],
    ) -> None:  # fmt: skip
        self._info = info
        self._members = members
        self._pipes = pipes
        self._mirrors = mirrors
        self._left_out = 0
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(self)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)

    def collect(self) -> Iterator[Metric]:
        """All metrics, as they are now."""
        self._left_out = 0
        info, pipes = self._info(), list(self._pipes())
        yield self._counts("upipe_nodes", "Nodes that this one knows, itself among them.", "state",
                           (one.state for one in self._members()))  # fmt: skip
        yield self._counts("upipe_pipes", "Pipes that this node knows.", "state", (one.told.state for one in pipes))
        node = GaugeMetricFamily("upipe_node_load", "Processes that run or want to, over a minute.")
        node.add_metric([], info.load)
        yield node
        free = GaugeMetricFamily("upipe_shared_memory_free_bytes", "Shared memory that queues can still take.")
        free.add_metric([], info.free_shared_memory)
        yield free
        yield from self._streams(pipes)
        yield from self._crews(pipes)
        lag = GaugeMetricFamily(
            "upipe_mirror_lag_bytes", "Bytes that the sink copy of a mirror has not received.", labels=["mirror"]
        )
        for one in self._bounded(self._mirrors()):
            lag.add_metric([one.mirror], max(0, one.head - one.received) if one.role == "source" else 0)
        yield lag
        left = GaugeMetricFamily("upipe_series_left_out", "Series that are not shown, since there are too many.")
        left.add_metric([], self._left_out)
        yield left

    def _counts(self, name: str, doc: str, label: str, values: Iterable[str]) -> Metric:
        made = GaugeMetricFamily(name, doc, labels=[label])
        for value, count in sorted(Counter(values).items()):
            made.add_metric([value], count)
        return made

    def _streams(self, pipes: list[PipeInfo]) -> Iterator[Metric]:
        """As the coordinator knows them; other members show a pipe when it has ended."""
        rows = self._bounded((one.pipe, stream, books) for one in pipes for stream, books in one.told.books.items())
        kept = list(rows)
        for field, doc in (
            ("emitted", "Frames emitted."),
            ("finished", "Frames finished."),
            ("dead", "Frames that went to the dead letters."),
            ("dropped", "Frames dropped."),
            ("redelivered", "Frames given to another worker."),
            ("bytes", "Payload bytes emitted."),
        ):
            name = "upipe_stream_bytes" if field == "bytes" else f"upipe_stream_frames_{field}"
            made = CounterMetricFamily(name, doc, labels=["pipe", "stream"])
            for pipe, stream, books in kept:
                made.add_metric([pipe, stream], getattr(books, field))
            yield made

    def _crews(self, pipes: list[PipeInfo]) -> Iterator[Metric]:
        kept = list(self._bounded((one.pipe, name, crew) for one in pipes for name, crew in one.told.crews.items()))
        workers = GaugeMetricFamily("upipe_workers", "Workers that run.", labels=["pipe", "processor"])
        restarts = CounterMetricFamily("upipe_worker_restarts", "Workers replaced.", labels=["pipe", "processor"])
        letters = GaugeMetricFamily("upipe_dead_letters", "Dead letters that lie there.", labels=["pipe", "processor"])
        for pipe, name, crew in kept:
            workers.add_metric([pipe, name], crew.workers)
            restarts.add_metric([pipe, name], crew.restarts)
            letters.add_metric([pipe, name], crew.letters)
        yield from (workers, restarts, letters)

    def _bounded(self, rows: Iterable[T]) -> Iterator[T]:
        for number, row in enumerate(rows):
            if number < MOST_SERIES:
                yield row
            else:
                self._left_out += 1
