"""The queues of the submitting process: homes of what it emits (in*), copies of what comes to it (results, replies).

They lie in its process session, as those of a pipe on one host do: they go with the process, and after kill -9 at the
next sweep. What keeper and fork server do for a node, this does here, without workers.
"""

from __future__ import annotations

import itertools

from upipe.cluster import copies
from upipe.cluster.keeper_queues import epochs, renewed
from upipe.cluster.layout import HOLD, NodePlan, QueueHere, rewire
from upipe.graph.plan import PIPE, Plan
from upipe.graph.spec import PipeSpec
from upipe.memq.queue import MemQ
from upipe.runtime.provision import pickle_allowed
from upipe.runtime.waits import CONSUMER, PRODUCER

_numbers = itertools.count(1)


class OwnQueues:
    """Of one pipe. After `follow` it is as the plan says."""

    def __init__(self, spec: PipeSpec) -> None:
        self.spec = spec
        self.plan: NodePlan | None = None
        self.queues: dict[str, MemQ] = {}
        self.input_closed = False
        self._number = next(_numbers)

    @property
    def labels(self) -> dict[str, str]:
        """For MemQ.attach, by name."""
        return {name: queue.name for name, queue in self.queues.items()}

    @property
    def inputs(self) -> Plan:
        """What to emit into: the queues of the pipe's own input that take something."""
        here = self.plan.queues if self.plan else ()
        order = self.plan.order if self.plan else ()
        queues = tuple(one.plan for one in here if one.plan.source == PIPE and one.open)
        return Plan(self.spec.name, order, queues, ())

    def of(self, stream: str) -> dict[str, MemQ]:
        """The queues of RESULTS or REPLIES, by name."""
        here = self.plan.queues if self.plan else ()
        both = [one.plan for one in here if one.plan.target == PIPE]
        names = [one.name for one in both if (one.name.rpartition("-")[0] or one.name) == stream]
        return {name: self.queues[name] for name in names}

    def follow(self, plan: NodePlan) -> None:
        """Be as the plan says; what is only written no more is left by `leave`, once nobody emits into it.

        Raises:
            OutOfSharedMemory: and nothing has changed for the worse: follow again.
        """
        steps = rewire(self.plan, plan)
        here = {one.plan.name: one for one in plan.queues}
        for name in renewed(self.plan, plan):  # its mirror broke (mending.py): what was not read comes again
            if name in self.queues:
                self.queues.pop(name).unlink()
            self._make(here[name], epochs(plan)[name])
        for step in steps:
            if step.what == "make":
                self._make(here[step.name])
            elif step.what == "promote":
                copies.promote(self.queues[step.name])
            elif step.what == "discard":
                copies.discard(self.queues[step.name])
            elif step.what == "end":
                copies.end(self.queues[step.name])
        for step in steps:
            if step.what == "drop" and step.name in self.queues:
                self.queues.pop(step.name).unlink()  # closed when the last one lets go of it
        self.plan = plan
        if self.input_closed:
            self.close_input()

    def _make(self, here: QueueHere, epoch: int = 0) -> None:
        name, plan = here.plan.name, here.plan
        if name in self.queues:
            return  # an earlier try got so far
        label = f"c{self._number}.{name}" + (f".{epoch}" if epoch else "")
        made = MemQ(
            plan.capacity, policy="block", name=label, supervised=True,
            allow_pickle=pickle_allowed(self.spec, plan),
        )  # fmt: skip
        self.queues[name] = made
        copies.begin(made, here.role)
        if here.role == "home" and plan.source == PIPE:
            made.use_producer(0, 1)

    def leave(self) -> None:
        """Close the pipe's end of the inputs that drain: nobody emits into them any more."""
        for one in self.plan.queues if self.plan else ():
            if one.plan.source == PIPE and not one.open:
                self.queues[one.plan.name].close_producer(0)

    def close_input(self) -> None:
        """The pipe emits no more, into those that come later neither. Idempotent."""
        self.input_closed = True
        for one in self.plan.queues if self.plan else ():
            if one.plan.source == PIPE:
                self.queues[one.plan.name].close_producer(0)

    def end(self) -> None:
        """The pipe has ended: emits are dropped, reads come to the end of what is there; names go. Idempotent."""
        for one in self.plan.queues if self.plan else ():
            queue = self.queues[one.plan.name]
            if queue.is_closed:
                continue  # the program ends
            if one.plan.source == PIPE:
                copies.discard(queue)
            for number in (0, HOLD) if one.role == "home" else (0,):
                queue.close_producer(number)
            for end in (CONSUMER, PRODUCER):
                queue.bell(end).close()  # wakes who waits
        for queue in self.queues.values():
            queue.unlink()

