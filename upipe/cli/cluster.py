"""`upipe nodes` and `upipe pipes`: the cluster. One pipe: pipe.py."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from upipe.cli import asking, render
from upipe.cli.extra import Asked, asks, needs_cluster
from upipe.lifecycle import PIPE_ENDED

if TYPE_CHECKING:
    from upipe.cluster.wire import Member, PipeInfo


@click.command(short_help="List the nodes of the cluster.")
@asks
@needs_cluster
def nodes(to: Asked) -> None:
    """List the nodes of the cluster, with what they have; shm is shared memory that queues can still take."""
    render.terminal().print(asyncio.run(_nodes(to)))


@click.command(short_help="List pipes: their workers, and what passed through.")
@asks
@needs_cluster
def pipes(to: Asked) -> None:
    """List the pipes of the cluster: where their workers are, and what passed through."""
    render.terminal().print(asyncio.run(_pipes(to)))


# ---------------------------------------------------------------------------------------------------- doing


async def _nodes(to: Asked) -> render.Picture:
    from upipe.cluster.routes import MEMBERS

    async with await asking.client(to) as client:
        found = await client.call(MEMBERS)
    columns = ("node", "state", "address", "CPUs", "memory", "shm", "GPUs", "load", "labels")
    rows = [_node(one) for one in found.members]
    shown = [number for number in range(len(columns)) if columns[number] != "GPUs" or any(row[number] for row in rows)]
    picked = [tuple(row[number] for number in shown) for row in (columns, *rows)]  # labels need the room, in 80 columns
    return render.listing(picked[0], picked[1:], "no nodes")


def _node(one: Member) -> tuple[str, ...]:
    info, has = one.info, one.info.resources
    state = f"{one.state}, drains" if info.draining else one.state
    labels = " ".join(f"{name}={value}" for name, value in sorted(info.labels.items()))
    where = str(info.addresses[0]) if info.addresses else ""
    gpus = str(len(has.gpus)) if has.gpus else ""
    sizes = render.size(has.memory), render.size(info.free_shared_memory)
    return (info.node_id, state, where, f"{has.cpu:g}", *sizes, gpus, f"{info.load:.1f}", labels)


async def _pipes(to: Asked) -> render.Picture:
    from upipe.cluster.routes import PIPES

    reached = await asking.reached(to)
    async with asking.peers(reached) as peers:
        answers, failed = await asking.everywhere(
            reached.addresses, lambda node: peers.call(node, PIPES, seconds=asking.SECONDS)
        )
    found = best((node, one) for node in sorted(answers) for one in answers[node].pipes)
    columns = ("pipe", "state", "emitted", "finished", "dead", "dropped", "workers by node")
    notes = [*filter(None, map(why, (one for one, _ in found))), *asking.silent(failed)]
    return render.listing(columns, [_pipe(*one) for one in found], "no pipes", notes)


def best(told: Iterable[tuple[str, PipeInfo]]) -> list[tuple[PipeInfo, bool]]:
    """Of what nodes told of pipes, what is newest of each, and whether it has the books: while a pipe runs only its
    coordinator has them. Running ones last."""
    found: dict[str, tuple[PipeInfo, bool]] = {}
    for node, one in told:
        here = (one, one.coordinator == node or one.told.state in PIPE_ENDED)
        if one.pipe not in found or _rank(*here) > _rank(*found[one.pipe]):
            found[one.pipe] = here
    return sorted(found.values(), key=lambda pair: pair[0].told.state not in PIPE_ENDED)


def _rank(one: PipeInfo, books: bool) -> tuple[bool, int, bool]:
    return one.closed, one.epoch, books


def _pipe(one: PipeInfo, books: bool) -> tuple[str, ...]:
    kept = [book for stream, book in one.told.books.items() if stream != "replies"]
    sums = (sum(getattr(book, name) for book in kept) for name in ("emitted", "finished", "dead", "dropped"))
    return (one.pipe, one.told.state, *(render.count(each) if books else "?" for each in sums), "\n".join(seats(one)))


def why(one: PipeInfo) -> str:
    """Why it failed, or what it waits for."""
    if one.told.reasons:
        return f"{one.pipe} {one.told.state}: {one.told.reasons[0].partition(chr(10))[0]}"
    return f"{one.pipe} waits: {one.told.waiting}" if one.told.waiting else ""


def seats(one: PipeInfo) -> list[str]:
    """node: a#0,1 b#0, for each node."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, row in one.seats.items():
        for index, node in enumerate(row):
            if node:
                found.setdefault(node, {}).setdefault(name, []).append(str(index))
    return [f"{node[:8]}: {' '.join(map(_crew, crew, crew.values()))}" for node, crew in sorted(found.items())]


def _crew(name: str, numbers: list[str]) -> str:
    return f"{name}#{','.join(numbers)}"
