"""The command `upipe`: look at the queues of this user from outside, and clear away what dead processes left.

What a cluster needs stands beside it: token.py, doctor.py, submit.py (scripts as jobs), cluster.py (nodes, pipes),
pipe.py (one of them).
"""

from __future__ import annotations

import os
import platform
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import click

from upipe import __version__
from upipe.cli import render
from upipe.cli.cluster import nodes, pipes
from upipe.cli.doctor import doctor
from upipe.cli.pipe import pipe
from upipe.cli.submit import jobs, logs, stop, submit
from upipe.cli.token import token
from upipe.errors import UpipeError
from upipe.memq import segment
from upipe.memq.layout import LAYOUT_VERSION
from upipe.memq.queue import MemQ
from upipe.memq.stats import QueueStats

# ---------------------------------------------------------------------------------------------------- looking


def sessions() -> list[Path]:
    """Session directories of this user, oldest process first."""
    here = segment.root()
    return sorted((entry for entry in here.iterdir() if entry.is_dir()), key=lambda entry: _start(entry.name))


def _start(name: str) -> int:
    start = name.rpartition("-")[2]
    return int(start) if start.isdigit() else 0


def queues_of(session: Path) -> Iterator[str]:
    """Names of what may be queues in a session: its regular files."""
    try:
        names = sorted(os.listdir(session))
    except FileNotFoundError:
        return  # it ended this instant
    for name in names:
        try:
            mode = os.lstat(session / name).st_mode
        except FileNotFoundError:
            continue
        if name != "lock" and stat.S_ISREG(mode):
            yield name


def owner(session: Path) -> str:
    """What runs behind a session: its command line, or that it is dead."""
    pid, _, start = session.name.partition("-")
    if not (pid.isdigit() and start.isdigit()) or segment.start_time(int(pid)) != int(start):
        return "dead: `upipe sweep` removes it"
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return "dead: `upipe sweep` removes it"
    return " ".join(os.path.basename(word) if number < 2 else word for number, word in enumerate(words)).strip()


def read(session: Path, known: dict[str, MemQ]) -> dict[str, QueueStats | str]:
    """The counters of each queue of a session, or why they cannot be read. `known` keeps mappings for the next time."""
    found: dict[str, QueueStats | str] = {}
    for name in queues_of(session):
        label = f"{session.name}/{name}"
        try:
            if label not in known:
                known[label] = MemQ.attach(label)
            found[name] = known[label].stats()  # reads; a watcher is no participant
        except (UpipeError, OSError) as error:
            found[name] = str(error)
    return found


def look(known: dict[str, MemQ]) -> dict[str, dict[str, QueueStats | str]]:
    """Every queue of this user by session, each with what runs behind it; sessions without a queue are left out."""
    return {f"{one.name}  {owner(one)}": found for one in sessions() if (found := read(one, known))}


def looks(times: int | None) -> Iterator[render.Picture]:
    """One look a second, with rates, the given number of times."""
    known: dict[str, MemQ] = {}
    seen, then = look(known), time.monotonic()
    done = 0
    while times is None or done < times:
        time.sleep(max(0.0, then + 1.0 - time.monotonic()))
        before, seen = seen, look(known)
        passed, then = time.monotonic() - then, time.monotonic()
        yield render.queues(seen, before, passed)
        done += 1


# ---------------------------------------------------------------------------------------------------- the commands


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """uPipe: fast pipes of Python processes over shared memory, on one host or on many.

    `upipe-node` makes a host a node of a cluster.
    """


@main.command(short_help="List the queues of this user on this host.")
@click.option("-w", "--watch", is_flag=True, help="Again every second, with rates, until Ctrl-C.")
@click.option("-n", "--times", type=click.IntRange(1), help="With --watch: end after so many looks.")
def queues(watch: bool, times: int | None) -> None:
    """List all queues of this user, of any running process.

    Frames are those in the queue now, taken or not; emitted and finished are totals; proc. counts the processes that
    joined. Looking disturbs nothing: the counters lie in shared memory.
    """
    if not watch:
        render.terminal().print(render.queues(look({})))
        return
    try:
        render.redraw(looks(times))
    except KeyboardInterrupt:
        pass  # the wanted end


@main.command(short_help="Remove what dead processes left in shared memory.")
def sweep() -> None:
    """Remove what dead processes of this user left in shared memory.

    Only sessions whose process is proven dead, and whose lock nobody holds any more, are removed.
    """
    left = {session.name: _weigh(session) for session in sessions()}
    swept = segment.sweep()
    for name in swept:
        files, bytes_ = left.get(name, (0, 0))
        click.echo(f"removed {name}: {files} files, {bytes_:,} bytes")
    if not swept:
        click.echo("nothing to remove")


def _weigh(session: Path) -> tuple[int, int]:
    files = bytes_ = 0
    for folder, _, names in os.walk(session):
        for name in names:
            try:
                bytes_ += os.lstat(os.path.join(folder, name)).st_blocks * 512
                files += 1
            except FileNotFoundError:
                continue
    return files, bytes_


@main.command(short_help="Print the versions of uPipe, its layout and Python.")
def version() -> None:
    """Print the versions of uPipe, of its shared-memory layout and of Python."""
    click.echo(f"uPipe {__version__} (layout {LAYOUT_VERSION}), Python {platform.python_version()}")


for _command in (token, doctor, submit, jobs, logs, stop, nodes, pipes, pipe):
    main.add_command(_command)
