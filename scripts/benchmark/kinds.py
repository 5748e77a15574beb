"""Kinds of work with other shapes than one producer and one consumer: many to many, chains, idling, growth."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmark import processes, roles
from benchmark.model import Outcome, Work

if TYPE_CHECKING:
    from benchmark.peers.base import Transport

END = 2**62
SHIFT = 40  # value = producer << SHIFT | number


def mpmc(transport: Transport, work: Work) -> Outcome:
    """Values per second through one queue with many producers and consumers; each value is looked for at the end."""
    each = (work.n + work.warm) // work.producers
    flushed = roles.CONTEXT.Barrier(work.producers + 1)

    def produce(work: Work, gate: roles.Gate, number: int) -> dict[str, Any]:
        sender = transport.sender(work)
        with gate:
            began = time.perf_counter()
            sender.put_all(range(number << SHIFT, (number << SHIFT) + each))
            sender.flush()
            flushed.wait(300)
        sender.close()
        return {"began": began}

    def end(work: Work, gate: roles.Gate, number: int) -> dict[str, Any]:
        sender = transport.sender(work)
        with gate:
            flushed.wait(300)
            for _ in range(work.consumers):
                sender.put(END)
            sender.flush()
        sender.close()
        return {}

    def consume(work: Work, gate: roles.Gate, number: int) -> dict[str, Any]:
        receiver = transport.receiver(work)
        with gate:
            seen = list(iter(receiver.get, END))
            ended = time.perf_counter()
        receiver.close()
        return {"seen": np.array(seen, np.uint64), "ended": ended}

    todo = [*([produce] * work.producers), *([consume] * work.consumers), end]
    with transport.opened(work, 1):
        found = roles.together(work, todo, list(range(len(todo))))
    makers, takers = found[: work.producers], found[work.producers : -1]
    seconds = max(one["ended"] for one in takers) - min(one["began"] for one in makers)
    seen = np.concatenate([one["seen"] for one in takers])
    wanted = np.concatenate(
        [np.arange(p << SHIFT, (p << SHIFT) + each, dtype=np.uint64) for p in range(work.producers)]
    )
    distinct = np.intersect1d(seen, wanted)
    total = each * work.producers
    spent = sum(one["cpu"] for one in found) / total * 1e6
    return Outcome(total / seconds, total, int(distinct.size), int(seen.size - distinct.size), spent)


def chain(transport: Transport, work: Work) -> Outcome:
    """Microseconds of one value through `count` processes and back to where it began."""

    def drive(work: Work, gate: roles.Gate, number: int) -> dict[str, Any]:
        sender, receiver = transport.sender(work, 0), transport.receiver(work, work.count)
        with gate:
            return roles.ping(sender.put, receiver.get, work)

    def forward(work: Work, gate: roles.Gate, number: int) -> dict[str, Any]:
        receiver, sender = transport.receiver(work, number - 1), transport.sender(work, number)
        with gate:
            roles.echo(receiver.get, sender.put, work)
        return {}

    todo = [drive, *([forward] * work.count)]
    with transport.opened(work, work.count + 1):
        found = roles.together(work, todo, list(range(len(todo))))
    return roles.percentiles(found[0], work)


def idle(transport: Transport, work: Work) -> Outcome:
    """Per cent of a core that `count` consumers use, which all wait for a value on a queue of their own."""

    def wait(work: Work, gate: roles.Gate, number: int) -> dict[str, Any]:
        receiver = transport.receiver(work, number)
        with gate:
            value = receiver.get()
        return {"bad": value != number}

    def watch(work: Work, gate: roles.Gate, number: int) -> dict[str, Any]:
        senders = [transport.sender(work, one) for one in range(work.count)]
        with gate:
            time.sleep(0.5)
            everybody, me = os.getppid(), os.getpid()
            before = processes.tree_seconds(everybody, me)
            time.sleep(work.pause)
            used = processes.tree_seconds(everybody, me) - before
            for one, sender in enumerate(senders):
                sender.put(one)
                sender.flush()
        return {"used": used}

    todo = [*([wait] * work.count), watch]
    with transport.opened(work, work.count):
        found = roles.together(work, todo, list(range(len(todo))))
    wrong = sum(one["bad"] for one in found[:-1])
    return Outcome(found[-1]["used"] / work.pause * 100, work.count, work.count, wrong)


def among(transport: Transport, work: Work) -> Outcome:
    """Share of its lone rate that a queue keeps among `count` that both ends also have open.

    Beside it "in turn": what a round over all of them gives, as a share of the lone rate."""
    lone = _among(transport, work, 1, turns=False)
    quiet = _among(transport, work, work.count, turns=False)
    turns = _among(transport, work, work.count, turns=True)
    total = 3 * (work.n + work.warm)
    arrived = sum(one["arrived"] for one in (lone, quiet, turns))
    bad = sum(one["bad"] for one in (lone, quiet, turns))
    extra = {"lone": lone["rate"], "in turn": turns["rate"] / lone["rate"]}
    return Outcome(quiet["rate"] / lone["rate"], total, arrived, bad, extra=extra)


def _among(transport: Transport, work: Work, queues: int, turns: bool) -> dict[str, Any]:
    from benchmark.tally import Tally

    def produce(work: Work, gate: roles.Gate, number: int) -> dict[str, Any]:
        senders = [transport.sender(work, one) for one in range(queues)]
        for one in senders[1:]:
            one.put(0)
        puts = [one.put for one in senders]
        with gate:
            if turns:
                for value in range(work.n + work.warm):
                    puts[value % queues](value)
            else:
                senders[0].put_all(range(work.n + work.warm))
            for one in senders:
                one.flush()
        return {}

    def consume(work: Work, gate: roles.Gate, number: int) -> dict[str, Any]:
        receivers = [transport.receiver(work, one) for one in range(queues)]
        for one in receivers[1:]:
            one.get()
        gets = [one.get for one in receivers]
        tally = Tally(work.n, work.warm)
        with gate:
            if turns:
                tally.values(gets[value % queues]() for value in range(work.n + work.warm))
            else:
                tally.values(receivers[0].values())
        return {"rate": tally.rate, "arrived": tally.arrived, "bad": tally.bad}

    with transport.opened(work, queues):
        return roles.together(work, [produce, consume], [0, 1])[1]
