"""How far a source came, over queues that it does not write any more."""

from __future__ import annotations

from upipe.cluster.keeper_written import Written
from upipe.graph.plan import OutputPlan, WorkerPlan
from upipe.memq import MemQ


def worker(*queues: str) -> WorkerPlan:
    return WorkerPlan("a", 1, (), (OutputPlan("b", queues, 3), OutputPlan("c", ("always",), 3)), "replies", 0)


def test_what_was_emitted_elsewhere_counts_once() -> None:
    queues = {name: MemQ(1 << 16) for name in ("one", "two", "three", "always")}
    for number, queue in enumerate(queues.values(), 1):
        queue.declare_producer(3)
        queue.use_producer(3)
        queue.put_many(list(range(number)))
    written = Written(queues)
    assert written.before(worker("one")) == {}
    written.note(worker("one", "two"))
    written.note(worker("three"))
    assert written.before(worker("three")) == {"b": 3} and written.before(worker("one", "three")) == {"b": 2}
    written.dropped("one", queues["one"])
    written.dropped("one", queues.pop("one"))
    assert written.before(worker("three")) == {"b": 3} and written.before(worker("two")) == {"b": 1 + 3}
    for queue in queues.values():
        queue.close()
        queue.unlink()
