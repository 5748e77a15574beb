"""One connection between an agent and a keeper."""

from __future__ import annotations

import asyncio
import os
import socket

from upipe.cluster import keeping
from upipe.cluster.keeper_line import Line, peer
from upipe.cluster.keeping import KeeperNews


async def test_who_does_not_read_gets_the_newest_only() -> None:
    ours, theirs = socket.socketpair()
    gone: list[str] = []
    line = Line(keeping.to_keeper(), lambda line: None, lambda line, message: None, lambda line, why: gone.append(why))
    await asyncio.get_running_loop().create_unix_connection(lambda: line, sock=ours)
    assert (line.pid, line.uid) == (os.getpid(), os.geteuid()) == peer(theirs)
    for number in range(400):
        line.say(keeping.encode(KeeperNews((1, number), failed="x" * 20_000)))
    line.close()
    line.close()
    line.say(keeping.encode(KeeperNews((2, 0))))  # too late
    heard, reader = [], keeping.from_keeper()
    with theirs:
        theirs.setblocking(False)
        async with asyncio.timeout(60):
            while data := await asyncio.get_running_loop().sock_recv(theirs, 1 << 20):
                heard += [news.fence[1] for news in reader.feed(data)]
    assert heard[-1] == 399 and len(heard) < 100 and heard[:-1] == list(range(len(heard) - 1))
    assert gone == [""]
