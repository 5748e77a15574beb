"""`upipe pipe ID` and its company: one pipe of the cluster, what its workers print, what they could not process."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING, Any

import click
from rich.console import Group

from upipe.cli import asking, cluster, render
from upipe.cli.extra import Asked, asks, needs_cluster
from upipe.errors import NodeTimeout, NodeUnreachable

if TYPE_CHECKING:
    from upipe.cluster.peers import Peers
    from upipe.cluster.reach import Reached
    from upipe.cluster.wire import MirrorInfo, PipeInfo
    from upipe.runtime.spool import DeadLetter

_FIRST = 20
"""Dead letters that are shown."""


class _Pipe(click.Group):
    """`upipe pipe ID` is `upipe pipe show ID`: an id is never the name of a command, it ends in -xxxxxxxx."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = ["show", *args]
        return super().resolve_command(ctx, args)


@click.group(cls=_Pipe, short_help="One pipe: where it stands, its output, its dead letters; stop or drain it.")
def pipe() -> None:
    """One pipe of the cluster, by its id (`upipe pipes`); `upipe pipe ID` shows it."""


@pipe.command("show")
@asks
@click.argument("id")
@needs_cluster
def show(to: Asked, id: str) -> None:  # noqa: A002
    """Show pipe ID: its streams, and each queue between two hosts, with how far its copy is behind.

    Behind are the bytes of frames that the copy has not yet, and the age of the oldest of them; open the bytes that
    arrived there and are not finished, or what came of them has not left that host.
    """
    render.terminal().print(asyncio.run(_show(to, id)))


@pipe.command("output")
@asks
@click.argument("id")
@needs_cluster
def output(to: Asked, id: str) -> None:  # noqa: A002
    """Print what the workers of pipe ID print, on all nodes, until it has ended; Ctrl-C only ends the looking.

    Each line begins with its node where there are several. A node keeps the last 8 to 16 MiB.
    """
    asyncio.run(_output(to, id))


@pipe.command("letters")
@asks
@click.option("--traceback", is_flag=True, help="Each with the traceback of its worker.")
@click.argument("id")
@needs_cluster
def letters(to: Asked, traceback: bool, id: str) -> None:  # noqa: A002
    """Show the dead letters of pipe ID: frames that could not be processed, with the error."""
    asyncio.run(_letters(to, id, traceback))


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


# ---------------------------------------------------------------------------------------------------- showing


async def _known(found: Reached, peers: Peers, pipe: str) -> tuple[PipeInfo, bool, list[str]]:
    """What is known best of a pipe, whether it has the books, and who does not answer."""
    from upipe.cluster.routes import PIPE

    answers, failed = await asking.everywhere(
        found.addresses, lambda node: peers.call(node, PIPE, seconds=asking.SECONDS, pipe=pipe)
    )
    if not answers:
        said = [f"no node that answers knows pipe {pipe}: `upipe pipes` lists them", *asking.silent(failed)]
        raise click.ClickException("; ".join(said))
    [(info, books)] = cluster.best(answers.items())
    return info, books, asking.silent(failed)


async def _show(to: Asked, pipe: str) -> Group:
    from upipe.cluster.routes import MIRRORS

    found = await asking.reached(to)
    async with asking.peers(found) as peers:
        info, books, notes = await _known(found, peers, pipe)
        answers, _ = await asking.everywhere(
            found.addresses, lambda node: peers.call(node, MIRRORS, seconds=asking.SECONDS)
        )
    mirrors = [(node, one) for node in sorted(answers) for one in answers[node].mirrors]
    head = f"{info.pipe} {info.told.state}, coordinated by {info.coordinator}"
    return Group(
        head, *cluster.seats(info), "", _streams(info, books),
        *(["", picture] if (picture := copies(info.pipe, mirrors)) else []),
        *filter(None, [cluster.why(info)]), *notes,
    )  # fmt: skip


def _streams(info: PipeInfo, books: bool) -> render.Picture:
    names = ("emitted", "finished", "dead", "dropped", "redelivered")
    rows = [
        (stream, *(render.count(getattr(book, name)) for name in names)) for stream, book in info.told.books.items()
    ]
    missing = "nothing is known of its streams: the coordinator does not answer" if not books else "nothing passed yet"
    return render.listing(("stream", *names), rows, missing)


def copies(pipe: str, mirrors: Iterable[tuple[str, MirrorInfo]]) -> render.Picture | None:
    """Each queue between two hosts: two rows, what its source says and what its copy says. None: there is none.

    Args:
        mirrors: of any pipes, each with the node that told it.
    """
    rows = []
    for node, one in sorted(mirrors, key=lambda pair: (pair[1].mirror, pair[1].role != "source")):
        owner, _, name = one.mirror.partition(":")
        if owner != pipe:
            continue
        behind, waiting = one.head - one.received, one.received - one.finished
        source = one.role == "source"
        rows.append((
            name.partition("@")[0], f"{node[:8]} {'→' if source else '←'} {one.peer[:8]}", render.size(one.head),
            f"{render.size(behind)} {one.lag_seconds:.1f} s" if source else "", render.size(waiting), one.state,
        ))  # fmt: skip
    if not rows:
        return None
    return render.listing(("queue", "node, peer", "head", "behind", "open", "state"), rows, "")


# ---------------------------------------------------------------------------------------------------- what is left


async def _output(to: Asked, pipe: str) -> None:
    found = await asking.reached(to)
    async with asking.peers(found) as peers:
        info, _, _ = await _known(found, peers, pipe)
        answers, failed = await asking.everywhere(
            found.addresses, lambda node: _print(peers, node, pipe, f"{node[:8]}: " if len(found.addresses) > 1 else "")
        )
    for sentence in asking.silent(failed):
        click.echo(sentence, err=True)
    if not any(answers.values()):
        click.echo(f"the workers of {info.pipe} printed nothing", err=True)


async def _print(peers: Peers, node: str, pipe: str, prefix: str) -> bool:
    """Print the output of one node; whether there was any."""
    from upipe.cluster.routes import OUTPUT

    some = False
    async for line in _lines(peers.content(node, OUTPUT, pipe=pipe)):
        some = True
        sys.stdout.buffer.write(prefix.encode() + line)
        sys.stdout.buffer.flush()
    return some


async def _lines(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    rest = b""
    async for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            yield line + b"\n"
    if rest:
        yield rest + b"\n"


async def _letters(to: Asked, pipe: str, traceback: bool) -> None:
    import msgspec

    from upipe.cluster.routes import LETTERS
    from upipe.runtime.spool import DeadLetter

    found = await asking.reached(to)
    async with asking.peers(found) as peers:
        await _known(found, peers, pipe)

        async def ask(node: str) -> list[DeadLetter]:
            data = b"".join([piece async for piece in peers.content(node, LETTERS, pipe=pipe)])
            return msgspec.msgpack.decode(data, type=list[DeadLetter])

        answers, failed = await asking.everywhere(found.addresses, ask)
    told = [(node, letter) for node in sorted(answers) for letter in answers[node]]
    for node, letter in told[:_FIRST]:
        click.echo(_letter(node, letter, traceback))
    if len(told) > _FIRST:
        click.echo(f"and {len(told) - _FIRST:,} more")
    for sentence in asking.silent(failed):
        click.echo(sentence, err=True)
    if not told:
        click.echo("no dead letters")


def _letter(node: str, letter: DeadLetter, traceback: bool) -> str:
    """Its value is shown as far as no pickle must be read for it: this may be anybody's frame."""
    import msgspec

    from upipe.errors import FrameError

    try:
        value = repr(msgspec.structs.replace(letter, allow_pickle=False).value)
    except FrameError as unread:
        value = f"<{unread}>"
    where = f"{letter.worker} on {node[:8]}, from {letter.source or 'the pipe'}, position {letter.position:,}"
    error = f"{letter.error_kind}: {letter.error}".strip().splitlines()[0]
    text = f"{where}\n  {error} (delivered {letter.deliveries} times)\n  {value[:200]}{'...' * (len(value) > 200)}"
    return "\n".join([text, *(f"  | {line}" for line in letter.traceback.splitlines() if traceback)])


async def _end(to: Asked, pipe: str, how: str, deadline: float) -> str:
    from upipe.cluster.routes import DRAIN, STOP

    found = await asking.reached(to)
    async with asking.peers(found) as peers:
        info, _, _ = await _known(found, peers, pipe)
        info = await _ended(peers, (info.coordinator, found.node), STOP if how == "stop" else DRAIN, pipe, deadline)
    done = "is told to stop" if how == "stop" else f"drains, for {deadline:g} s at most"
    return f"{info.pipe} {info.told.state}" if info.closed else f"{info.pipe} {done}"


async def _ended(peers: Peers, nodes: tuple[str, str], route: Any, pipe: str, deadline: float) -> PipeInfo:
    """Tell the coordinator; while it is out of reach the other one, which passes it on to its successor."""
    from upipe.cluster.wire import Stopping

    try:
        return await peers.call(nodes[0], route, Stopping(deadline), pipe=pipe)
    except (NodeUnreachable, NodeTimeout):
        return await peers.call(nodes[1], route, Stopping(deadline), pipe=pipe)
