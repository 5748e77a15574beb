"""Discovery by multicast DNS: advertises this agent as _upipe._tcp.local. and hears of others, on every interface.

    instance  <node id>._upipe._tcp.local.      SRV: port      A, AAAA: addresses
    TXT       cluster=<name> node=<node id> proto=<protocol version> version=<uPipe's> fp=<key fingerprint>

All of it is a hint that anybody on the network can forge: it is bounded, checked for form, and given to the membership
machine, which dials and lets the handshake decide. zeroconf is imported when a Multicast starts, and nowhere else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from upipe.cluster.address import Address, parse
from upipe.cluster.interfaces import Watch
from upipe.cluster.member_events import Hint
from upipe.cluster.messages import MAX_HOSTS, NodeInfo
from upipe.errors import OptionInvalid

if TYPE_CHECKING:
    from zeroconf import ServiceStateChange, Zeroconf
    from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

SERVICE = "_upipe._tcp.local."
LOOKUPS = 32
"""Most advertisements looked up at a time; of a flood the rest is dropped, and heard when it is repeated."""
LOOKUP_TIMEOUT = 3.0
"""Seconds for the records of one advertisement, tried LOOKUP_TRIES times: zeroconf tells each only once."""
LOOKUP_TRIES = 3
HEARD = 4096
"""Most node ids remembered as heard."""

_NODE_ID = re.compile(r"[0-9a-f]{16}")
_FINGERPRINT = re.compile(r"[0-9a-f]{0,128}")
_log = logging.getLogger(__name__)


class Multicast:
    """Advertises and browses from start() to close().

    Args:
        found: called in the event loop with each hint, whenever an advertisement appears or changes.
        changed: called when addresses or links of this machine changed; tell what follows of it with update().
    """

    def __init__(self, found: Callable[[Hint], None], changed: Callable[[], None] = lambda: None) -> None:
        self._found = found
        self._changed = changed
        self._zeroconf: AsyncZeroconf | None = None
        self._browser: AsyncServiceBrowser | None = None
        self._service: AsyncServiceInfo | None = None
        self._watch: Watch | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._lookups: set[str] = set()
        self._own = ""
        self.heard: set[str] = set()
        """Node ids that were advertised, whoever did it; at most HEARD. See multicast.unheard."""

    async def start(self, info: NodeInfo, *, advertise: bool = True) -> str | None:
        """Begin. advertise: False only browses (a submitting process).

        Returns:
            None, or a sentence why there is no multicast; then nothing runs, and seeds are the way.
        """
        from zeroconf import IPVersion
        from zeroconf.asyncio import AsyncServiceBrowser, AsyncZeroconf

        library = logging.getLogger("zeroconf")
        if library.level in (logging.NOTSET, logging.WARNING):
            library.setLevel(logging.ERROR)  # it warns, with a traceback, of each interface that goes down
        reason = ""
        for version in (IPVersion.All, IPVersion.V4Only, IPVersion.V6Only):  # the first that this kernel can do
            try:
                self._zeroconf = AsyncZeroconf(ip_version=version)
                break
            except (OSError, RuntimeError) as error:
                reason = reason or str(error)
        if self._zeroconf is None:
            return f"multicast DNS cannot start ({reason}); nodes are found by --join HOST:PORT only"
        self._own = info.node_id
        self._browser = AsyncServiceBrowser(self._zeroconf.zeroconf, SERVICE, handlers=[self._browsed])
        self._watch = Watch(self._interfaces_changed)
        if advertise:
            self._service = service_info(info)
            await self._advertise()
        return None

    async def update(self, info: NodeInfo) -> None:
        """Advertise what changed (addresses, port). Nothing before start() and after close()."""
        if self._zeroconf is None or self._service is None:
            return
        service = service_info(info)
        if (service.text, service.port, service.parsed_addresses()) == self._said():
            return
        self._service = service
        await (await self._zeroconf.async_update_service(self._service))

    async def close(self) -> None:
        """Say good-bye and end. Idempotent."""
        if self._watch is not None:
            self._watch.close()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        browser, self._browser = self._browser, None
        zeroconf, self._zeroconf = self._zeroconf, None
        if browser is not None:
            await browser.async_cancel()
        if zeroconf is not None:
            await zeroconf.async_close()

    def _said(self) -> tuple[bytes, int | None, list[str]]:
        assert self._service is not None
        return self._service.text, self._service.port, self._service.parsed_addresses()

    async def _advertise(self) -> None:
        assert self._zeroconf is not None
        assert self._service is not None
        # No probing for a conflict: the name is our random id, and what answers to it is our own last life, kept in
        # others' caches. The announcements go on in the background; the first has left when this returns.
        done = await self._zeroconf.async_register_service(self._service, cooperating_responders=True)
        self._spawn(_finish(done))

    # -------------------------------------------------------------- what comes in

    def _browsed(self, zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        from zeroconf import ServiceStateChange

        if state_change is ServiceStateChange.Removed:
            return  # anybody can forge a good-bye; members say theirs over a proven connection
        if name in self._lookups or len(self._lookups) >= LOOKUPS:
            return
        self._lookups.add(name)
        self._spawn(self._look_up(zeroconf, service_type, name))

    async def _look_up(self, zeroconf: Zeroconf, service_type: str, name: str) -> None:
        from zeroconf import Error
        from zeroconf.asyncio import AsyncServiceInfo

        try:
            info = AsyncServiceInfo(service_type, name)
            for _ in range(LOOKUP_TRIES):
                if await info.async_request(zeroconf, LOOKUP_TIMEOUT * 1000):
                    break
            else:
                return
            hint = read_hint(info.properties, info.parsed_scoped_addresses(), info.port or 0)
        except (Error, OSError, ValueError) as error:
            _log.debug("an advertisement cannot be read: %s", error)
            return
        finally:
            self._lookups.discard(name)
        if hint is not None:
            if len(self.heard) < HEARD:
                self.heard.add(hint.node_id)
            self._found(hint)

    # -------------------------------------------------------------- interfaces

    def _interfaces_changed(self) -> None:
        self._spawn(self._follow_interfaces())
        self._changed()

    async def _follow_interfaces(self) -> None:
        if self._zeroconf is not None:
            await self._zeroconf.async_update_interfaces()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(_logged(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _finish(done: Awaitable[Any]) -> None:
    await done


async def _logged(work: Coroutine[Any, Any, None]) -> None:
    """Discovery never takes an agent down: what fails here costs finding somebody later."""
    try:
        await work
    except asyncio.CancelledError:
        raise
    except Exception as error:
        _log.warning("multicast DNS: %s: %s", type(error).__name__, error)


# ---------------------------------------------------------------- what is said, and read


def service_info(info: NodeInfo) -> AsyncServiceInfo:
    """The advertisement of a node."""
    from zeroconf.asyncio import AsyncServiceInfo

    return AsyncServiceInfo(
        SERVICE,
        f"{info.node_id}.{SERVICE}",
        port=info.port,
        properties=txt(info),
        server=f"upipe-{info.node_id}.local.",
        parsed_addresses=[host.partition("%")[0] for host in info.hosts if Address(host, 1).is_ip],
    )


def txt(info: NodeInfo) -> dict[str, str]:
    """The TXT record. Each entry fits its 255 bytes; a cluster's name that does not is left to the handshake."""
    return {
        "cluster": info.cluster if len(info.cluster.encode()) <= 200 else "",
        "node": info.node_id,
        "proto": str(info.protocol),
        "version": info.version[:64],
        "fp": info.fingerprint[:128],
    }


def read_hint(properties: Mapping[bytes, bytes | None], hosts: Iterable[str], port: int) -> Hint | None:
    """A hint out of records that anybody may have written; None when they are no advertisement of ours."""
    words = {_text(key): _text(value) for key, value in properties.items()}
    node_id, protocol = words.get("node", ""), words.get("proto", "")
    fingerprint = words.get("fp", "")
    if not _NODE_ID.fullmatch(node_id) or not protocol.isdigit() or len(protocol) > 6 or not 0 < port < 65536:
        return None
    addresses = []
    for host in hosts:
        with contextlib.suppress(OptionInvalid):
            addresses.append(parse(f"[{host}]:{port}" if ":" in host else f"{host}:{port}"))
    if not addresses:
        return None
    return Hint(
        tuple(addresses[:MAX_HOSTS]),
        "zeroconf",
        node_id,
        words.get("cluster", ""),
        int(protocol),
        fingerprint if _FINGERPRINT.fullmatch(fingerprint) else "",
        words.get("version", "")[:64],
    )


def _text(data: bytes | None) -> str:
    text = (data or b"").decode("utf-8", "replace")
    return text if text.isprintable() else ""
