"""Links over real connections without HTTP, plain or TLS, on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable

from upipe.cluster.link import Link


class _Accepted(Link):
    def __init__(self, joined: Callable[[Link], None]) -> None:
        super().__init__()
        self._joined = joined

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._joined(self)


@contextlib.asynccontextmanager
async def server(joined: Callable[[Link], None], tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """The accepting side; gives its port. `joined` gets each link."""
    links: list[Link] = []

    def accepted() -> Link:
        links.append(_Accepted(joined))
        return links[-1]

    listening = await asyncio.get_running_loop().create_server(accepted, "127.0.0.1", 0, ssl=tls)
    try:
        yield listening.sockets[0].getsockname()[1]
    finally:
        listening.close()
        for link in links:
            link.close()


async def dial(port: int, link: Link | None = None, tls: ssl.SSLContext | None = None) -> Link:
    """The dialling side."""
    link = link or Link()
    name = "127.0.0.1" if tls else None
    await asyncio.get_running_loop().create_connection(lambda: link, "127.0.0.1", port, ssl=tls, server_hostname=name)
    return link
