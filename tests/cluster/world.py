"""A cluster in simulated time: agents with schedulers, keepers that follow plans, a network that loses and repeats.

Small enough to be believed: a keeper runs what its plan says at once; its queues are empty as soon as they are asked;
a processor ends when its inputs may end (or, a root, when the world says so).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from upipe.cluster.dealings import (
    Arrange,
    Ask,
    Heard,
    Message,
    NodeDown,
    NodeReport,
    NodeUp,
    QueueState,
    Replicate,
    Reported,
    Save,
    Send,
    TellClient,
    Tick,
)
from upipe.cluster.layout import NodePlan
from upipe.cluster.placement import Unplaceable
from upipe.cluster.record import Books, Record
from upipe.cluster.room import Node
from upipe.cluster.scheduler import Scheduler
from upipe.graph.spec import PipeSpec

Refusal = tuple[tuple[tuple[str, int], ...], dict[str, float]]


@dataclass
class Keeper:
    """The keeper of the pipe on one node."""

    node: str
    fence: tuple[int, int] = (0, 0)
    plan: NodePlan | None = None
    boss: str = ""
    """The agent that arranged it last; reports go there."""
    number: int = 0
    lost: bool = False
    runs: dict[str, int] = field(default_factory=dict)
    """Workers that run, with the epoch under which they were started."""
    ended: set[tuple[str, int]] = field(default_factory=set)
    faults: dict[str, int] = field(default_factory=dict)
    """Queues whose mirrors break here, up to the given epoch."""
    unfit: str = ""
    """It cannot run the pipe, with the reason."""
    room: Callable[[NodePlan, set[str]], Refusal] = lambda plan, runs: ((), {})
    """The workers that there is no room for beside those that run, and what others have of the node."""
    refused: Refusal = ((), {})

    def arrange(self, told: Arrange, boss: str) -> None:
        if told.fence < self.fence:
            return
        self.boss = boss
        if (self.lost or self.unfit) and told.plan is not None:
            return  # what the plan speaks of is gone, or cannot be had
        self.fence, self.plan, self.lost = told.fence, told.plan, False
        if told.plan is None:
            self.runs, self.ended = {}, set()
            return
        self.refused = self.room(told.plan, set(self.runs))
        workers = tuple(one for one in told.plan.workers if (one.processor, one.index) not in self.refused[0])
        self.plan = msgspec.structs.replace(told.plan, workers=workers)
        mine = {f"{one.processor}#{one.index}": (one.processor, one.index) for one in workers}
        self.ended &= set(mine.values())
        want = {name for name, key in mine.items() if name not in told.plan.leaving and key not in self.ended}
        self.runs = {name: self.runs.get(name, told.plan.epoch) for name in sorted(want)}

    def seats(self) -> list[tuple[str, int]]:
        """What it has agreed to run, and has not ended."""
        mine = [(one.processor, one.index) for one in self.plan.workers] if self.plan else []
        return [seat for seat in mine if seat not in self.ended]

    def die(self) -> None:
        had = self.plan is not None or self.lost
        self.runs, self.plan, self.ended, self.lost, self.fence = {}, None, set(), had, (0, 0)

    def work(self, over: bool) -> None:
        """What can end, ends."""
        for worker in self.plan.workers if self.plan else ():
            name = f"{worker.processor}#{worker.index}"
            assert self.plan is not None
            queues = {queue.plan.name: queue for queue in self.plan.queues}
            if name in self.runs and (all(queues[one].ends for one in worker.inputs) if worker.inputs else over):
                del self.runs[name]
                self.ended.add((worker.processor, worker.index))

    def report(self, over: bool) -> NodeReport:
        self.number += 1
        if self.plan is None:
            return NodeReport(self.node, self.number, self.fence, False, self.lost, unfit=self.unfit)
        leaving = tuple(
            (one.processor, one.index)
            for one in self.plan.workers
            if f"{one.processor}#{one.index}" in self.plan.leaving and (one.processor, one.index) not in self.ended
        )
        state = QueueState(True, True, True, Books(1, 1))
        queues = {queue.plan.name: state for queue in self.plan.queues}
        for mirror in self.plan.mirrors:
            if mirror.epoch <= self.faults.get(mirror.queue, 0):
                queues[mirror.queue] = QueueState(broken="no frame starts there", epoch=mirror.epoch, broken_at=64)
        return NodeReport(
            self.node, self.number, self.fence, True, False, tuple(sorted(self.ended)), leaving, queues, over,
            refused=self.refused[0], others=self.refused[1],
        )  # fmt: skip


class World:
    """All of it.

    Args:
        ids: of the nodes; each has an agent, which is up.
        cpu: cores of each.
        client: node id of the submitter, which is always reachable; "" without.
    """

    def __init__(self, ids: str, cpu: float = 8.0, client: str = "") -> None:
        self.now = 0.0
        self.nodes = {one: Node(one, f"host-{one}", {"cpu": cpu}, shm=1 << 40) for one in ids}
        self.keepers = {one: Keeper(one) for one in (*ids, *((client,) if client else ()))}
        self.schedulers: dict[str, Scheduler] = {}
        self.disk: dict[str, Save] = {}
        self.alive = set(ids)
        """Agents that run."""
        self.cut: set[tuple[str, str]] = set()
        """(from, to): nothing passes."""
        self.wire: list[tuple[str, str, Any]] = []
        """(from, to, what) on the way."""
        self.client = client
        self.told: list[TellClient] = []
        self.over = False
        """The roots have nothing more to emit."""
        self.seen: dict[str, set[str]] = {one: set(ids) for one in ids}
        self.coordinators: dict[int, str] = {}
        """Who ever coordinated an epoch with a record that counts."""
        self.records: dict[tuple[int, int], Record] = {}

    # ------------------------------------------------------------------ what happens

    def submit(self, spec: PipeSpec, to: str) -> Unplaceable | None:
        found = Scheduler.submit(to, "run-1", spec, self.nodes.values(), self.client, self.now)
        if isinstance(found, Unplaceable):
            return found
        self.schedulers[to], commands = found
        for node in self.nodes.values():
            self.schedulers[to].up[node.id] = node
        self.do(to, commands)
        return None

    def do(self, node: str, commands: list[Any]) -> None:
        for command in commands:
            if isinstance(command, Save):
                self.disk[node] = command
            elif isinstance(command, Send):
                self.wire.append((node, command.node, command.message))
            elif isinstance(command, Arrange):
                self.wire.append((node, command.node, command))
            else:
                self.told.append(command)
        self.check()

    def event(self, node: str, event: Any) -> None:
        if node in self.schedulers:
            self.do(node, self.schedulers[node].handle(event, self.now))

    def passes(self, source: str, target: str) -> bool:
        return (source, target) not in self.cut and target in {*self.alive, self.client}

    def deliver(self, index: int, again: bool = False) -> None:
        """Something on the way arrives, in any order; `again`: and stays on the way."""
        source, target, what = self.wire[index] if again else self.wire.pop(index)
        if not self.passes(source, target):
            return
        if isinstance(what, Arrange):
            self.keepers[target].arrange(what, source)
            self.report(target)
        elif isinstance(what, NodeReport):
            self.event(target, Reported(what))
        else:
            self.message(target, what)

    def message(self, target: str, what: Message) -> None:
        if target not in self.schedulers:
            if not isinstance(what, Ask | Replicate):
                return
            self.begin(target, Scheduler(target, what.record))
        self.event(target, Heard(what))

    def begin(self, node: str, scheduler: Scheduler) -> None:
        self.schedulers[node] = scheduler
        for other in self.seen[node]:
            self.do(node, scheduler.handle(NodeUp(self.nodes[other]), self.now))

    def report(self, node: str) -> None:
        keeper = self.keepers[node]
        keeper.work(self.over)
        if keeper.boss and (node in self.alive or node == self.client):
            self.wire.append((node, keeper.boss, keeper.report(self.over)))

    def kill_agent(self, node: str) -> None:
        self.alive.discard(node)
        self.schedulers.pop(node, None)

    def kill_node(self, node: str) -> None:
        self.kill_agent(node)
        self.keepers[node].die()

    def start_agent(self, node: str) -> None:
        if node in self.alive:
            return
        self.alive.add(node)
        self.seen[node] = {node}
        if node in self.disk:
            saved = self.disk[node]
            self.begin(node, Scheduler(node, saved.record, saved.promised, saved.promised_to))

    def look(self) -> None:
        """Every agent learns who is alive, as far as it hears from them."""
        for node in sorted(self.alive):
            now = {other for other in self.alive if other == node or (other, node) not in self.cut}
            for other in sorted(now ^ self.seen[node]):
                self.event(node, NodeUp(self.nodes[other]) if other in now else NodeDown(other))
            self.seen[node] = now

    def tick(self, seconds: float = 0.25) -> None:
        self.now += seconds
        for node in sorted(self.schedulers):
            due = self.schedulers[node].deadline()
            if due is not None and due <= self.now:
                self.event(node, Tick())

    def settle(self, rounds: int = 60) -> None:
        """Everything arrives, everybody looks, time passes."""
        for _ in range(rounds):
            self.look()
            for _ in range(200):
                if not self.wire:
                    break
                self.deliver(0)
            for node in sorted(self.keepers):
                self.report(node)
            self.tick()

    def heal(self) -> None:
        self.cut.clear()
        for node in self.nodes:
            self.start_agent(node)
        self.settle()

    # ------------------------------------------------------------------ what must hold

    def check(self) -> None:
        for node, scheduler in self.schedulers.items():
            counted = scheduler.ballot.counted
            if counted is None:
                continue
            assert counted.coordinator == node
            assert self.coordinators.setdefault(counted.epoch, node) == node, "two coordinators in one epoch"
            if counted.fence not in self.records:
                for epoch, revision in self.records:
                    assert (epoch < counted.epoch) == (revision < counted.revision) or epoch == counted.epoch, "forgot"
                self.records[counted.fence] = counted
            assert self.records[counted.fence] == counted, "two records of one revision"

    def running(self) -> list[str]:
        """Every worker that runs anywhere."""
        return sorted(name for keeper in self.keepers.values() for name in keeper.runs)

    @property
    def leader(self) -> Scheduler:
        """The only one that coordinates."""
        (found,) = [one for one in self.schedulers.values() if one.coordinates]
        return found
