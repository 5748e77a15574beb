"""How much shared memory the queues of a pipe take, on whatever node they come to lie. Pure.

    edge a -> b, a on nodes 1 2, b on nodes 2 3:     node 1: 1->2 1->3     node 2: 1->2 2->2 2->3     node 3: 1->3 2->3

A queue from a node to another has two copies of equal size, one on each; to the same node it has one.
"""

from __future__ import annotations

from collections import defaultdict
from functools import cached_property

from upipe.graph.plan import DRIVER_INPUT_BYTES
from upipe.graph.spec import EdgeSpec, PipeSpec, ProcessorSpec
from upipe.memq._ring import segment_bytes

Bytes = dict[str, int]
"""Bytes by node id."""


class Sizes:
    """Ring bytes of the queues of one pipe, and the edges by their ends."""

    def __init__(self, spec: PipeSpec) -> None:
        self.spec = spec
        self.incoming: dict[str, list[EdgeSpec]] = defaultdict(list)
        self.outgoing: dict[str, list[EdgeSpec]] = defaultdict(list)
        for edge in spec.edges:
            self.outgoing[edge.source].append(edge)
            self.incoming[edge.target].append(edge)
        self.inputs = {one.name: self._input(one) for one in spec.roots() if one.kind != "source"}
        """Of the queue from the pipe, for each root that takes input."""

    def _input(self, root: ProcessorSpec) -> int:
        return self.spec.settings.edge_bytes if root.kind in ("map", "class") else DRIVER_INPUT_BYTES

    @cached_property
    def to_pipe(self) -> int:
        """Of results and replies: as large as the largest queue, so that whatever came in can go out."""
        edges = [self.spec.edge_bytes(edge) for edge in self.spec.edges]
        return max([self.spec.settings.sink_bytes, *edges, *self.inputs.values()])

    @cached_property
    def edge_segments(self) -> dict[tuple[str, str], int]:
        """Bytes of one copy of a queue of each edge, by (source, target), with everything around the ring."""
        return {(edge.source, edge.target): segment_bytes(self.spec.edge_bytes(edge))[1] for edge in self.spec.edges}

    @cached_property
    def input_segments(self) -> dict[str, int]:
        """The same for `inputs`."""
        return {name: segment_bytes(size)[1] for name, size in self.inputs.items()}

    @cached_property
    def to_pipe_segment(self) -> int:
        """The same for `to_pipe`."""
        return segment_bytes(self.to_pipe)[1]

    def added(self, name: str, node: str, seats: dict[str, dict[str, int]], tenants: dict[str, int]) -> Bytes:
        """What one more worker of processor `name` on `node` adds, on every node.

        Args:
            seats: workers by processor and node id, before it.
            tenants: workers by node id, before it.
        """
        more: Bytes = defaultdict(int)
        first = node not in seats[name]
        for edge in self.incoming[name]:
            if first or edge.keyed:
                for other in seats[edge.source]:
                    _pair(more, other, node, self.edge_segments[edge.source, name], 1)
        if not first:
            return more
        for edge in self.outgoing[name]:
            for other, count in seats[edge.target].items():
                _pair(more, node, other, self.edge_segments[name, edge.target], count if edge.keyed else 1)
        more[node] += self.input_segments.get(name, 0)
        more[node] += 0 if self.outgoing[name] else self.to_pipe_segment
        if not tenants.get(node):
            more[node] += self.to_pipe_segment  # replies, of all workers on a node together
        return more


def _pair(more: Bytes, source: str, sink: str, size: int, count: int) -> None:
    more[source] += size * count
    if sink != source:
        more[sink] += size * count
