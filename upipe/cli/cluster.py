"""`upipe nodes`, `upipe pipes` and `upipe pipe`: the cluster, as one of its agents knows it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import click

from upipe.cli import render
from upipe.cli.extra import Asked, asks, needs_cluster

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
    """List the pipes that the node knows: where their workers are, and what passed through."""
    render.terminal().print(asyncio.run(_pipes(to)))


@click.group(short_help="End a pipe: stop it now, or drain it.")
def pipe() -> None:
    """End one pipe of the cluster, by its id (`upipe pipes`)."""


@pipe.command("stop")
@asks
@click.argument("id")
@needs_cluster
def stop(to: Asked, id: str) -> None:  # noqa: A002
    """End pipe ID now; frames that are on their way are lost."""
    click.echo(asyncio.run(_end(to, id, "stop", 10.0)))


@pipe.command("drain")
@asks
@click.option("--deadline", default=30.0, show_default=True, help="Seconds after which it is stopped.")
@click.argument("id")
@needs_cluster
def drain(to: Asked, deadline: float, id: str) -> None:  # noqa: A002
    """Let pipe ID take no more in, finish what it has, and end."""
    click.echo(asyncio.run(_end(to, id, "drain", deadline)))


# ---------------------------------------------------------------------------------------------------- doing


async def _nodes(to: Asked) -> render.Picture:
    from upipe.cluster.reach import reach
    from upipe.cluster.routes import MEMBERS

    async with (await reach(to.where, own=to.own)).client() as client:
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
    from upipe.cluster.reach import reach
    from upipe.cluster.routes import PIPES

    async with (await reach(to.where, own=to.own)).client() as client:
        found = await client.call(PIPES)
    columns = ("pipe", "state", "emitted", "finished", "dead", "dropped", "workers by node")
    return render.listing(columns, map(_pipe, found.pipes), "no pipes", filter(None, map(_why, found.pipes)))


def _pipe(one: PipeInfo) -> tuple[str, ...]:
    books = [book for stream, book in one.told.books.items() if stream != "replies"]
    sums = (sum(getattr(book, name) for book in books) for name in ("emitted", "finished", "dead", "dropped"))
    return (one.pipe, one.told.state, *map(render.count, sums), "\n".join(_seats(one)))


def _why(one: PipeInfo) -> str:
    """Why it failed, or what it waits for."""
    if one.told.reasons:
        return f"{one.pipe} {one.told.state}: {one.told.reasons[0].partition(chr(10))[0]}"
    return f"{one.pipe} waits: {one.told.waiting}" if one.told.waiting else ""


def _seats(one: PipeInfo) -> list[str]:
    """node: a#0,1 b#0, for each node."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, row in one.seats.items():
        for index, node in enumerate(row):
            if node:
                found.setdefault(node, {}).setdefault(name, []).append(str(index))
    return [f"{node[:8]}: {' '.join(map(_crew, crew, crew.values()))}" for node, crew in sorted(found.items())]


def _crew(name: str, numbers: list[str]) -> str:
    return f"{name}#{','.join(numbers)}"


async def _end(to: Asked, pipe: str, how: str, deadline: float) -> str:
    from upipe.cluster import wire
    from upipe.cluster.reach import reach
    from upipe.cluster.routes import DRAIN, STOP

    async with (await reach(to.where, own=to.own)).client() as client:
        info = await client.call(STOP if how == "stop" else DRAIN, wire.Stopping(deadline), pipe=pipe)
    done = "is told to stop" if how == "stop" else f"drains, for {deadline:g} s at most"
    return f"{info.pipe} {info.told.state}" if info.closed else f"{info.pipe} {done}"
