"""What autoscaling looks at: the inputs of the processors that may scale, measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from upipe.errors import QueueError
from upipe.graph.plan import Plan
from upipe.graph.spec import PipeSpec
from upipe.memq.queue import MemQ
from upipe.runtime.events import Load


def loads(spec: PipeSpec, plan: Plan, queues: Mapping[str, MemQ]) -> Iterator[Load]:
    """One event per processor that scales. A queue whose lock is not to be had (a worker was stopped inside) is left
    out."""
    for one in spec.processors:
        if one.autoscale:
            try:
                read = {name for worker in plan.workers if worker.processor == one.name for name in worker.inputs}
                yield _load(one.name, [queues[name] for name in read])
            except QueueError:
                continue


def _load(name: str, inputs: list[MemQ]) -> Load:
    stats = [queue.stats() for queue in inputs]
    waiting = sum(queue.qsize() for queue in inputs)
    return Load(
        name,
        used_share=max((found.depth / found.capacity for found in stats), default=0.0),
        oldest_age=max((found.oldest_age() for found in stats), default=0.0) if waiting else 0.0,
        waiting=waiting,
        ended=bool(inputs) and all(queue.ended for queue in inputs),
    )
