"""What a user says to `upipe-node`, read and checked before anything is opened.

Everything that can be wrong here is one sentence (ClusterError), said before the node has touched a port.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from pathlib import Path

from upipe import __version__
from upipe.cluster import tls, token
from upipe.cluster.address import DEFAULT_PORT
from upipe.cluster.guard import may_listen
from upipe.cluster.interfaces import reachable_at
from upipe.cluster.messages import NodeInfo, Resources
from upipe.cluster.node_id import Identity, default_data_dir
from upipe.cluster.resources import free_shared_memory, load, parse_labels, parse_resources
from upipe.cluster.seeds import Seed, parse_seed
from upipe.cluster.token import Secret
from upipe.errors import NodeCannotServe, OptionInvalid
from upipe.settings import Certificates

DEFAULT_CLUSTER = "upipe"
DRAIN_SECONDS = 30.0
"""Seconds that a node which is told to go waits for its workers to move. Longer loses less work on a busy cluster, and
keeps the one who waits for the node to end (systemd gives 90 s)."""
HOST_LABEL = "host"
"""Label that each node has by itself: its host name, by which pins find it."""


@dataclass(frozen=True)
class Options:
    """As on the command line; see `upipe-node --help`."""

    cluster: str = DEFAULT_CLUSTER
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    """0 takes a free one."""
    join: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    resources: tuple[str, ...] = ()
    data_dir: Path = field(default_factory=default_data_dir)
    token_file: Path | None = None
    allow_host: tuple[str, ...] = ()
    own: Certificates | None = None
    """That were brought along."""
    multicast: bool = True
    drain_seconds: float = DRAIN_SECONDS


@dataclass(frozen=True)
class Settled:
    """Options that were read."""

    options: Options
    secret: Secret
    seeds: tuple[Seed, ...]
    labels: dict[str, str]
    resources: dict[str, float]
    """As of --resources."""

    def credentials(self, node_id: str) -> tls.Credentials:
        """What this node shows. Made anew each time: call it again to renew.

        Raises:
            CertificateError: those that were brought cannot be used.
        """
        identity = tls.Identity("node", node_id)
        if self.options.own is not None:
            return tls.bring(self.options.own, identity)
        names = ("localhost", "127.0.0.1", "::1", *reachable_at(self.options.host), *self.options.allow_host)
        return tls.issue(self.secret, identity, dict.fromkeys(names))

    def info(self, identity: Identity, port: int, found: Resources) -> NodeInfo:
        """What this node tells of itself when it begins."""
        return NodeInfo(
            identity.node_id, self.options.cluster, reachable_at(self.options.host), port, identity.incarnation,
            version=__version__, fingerprint=self.secret.fingerprint, labels=self.labels, resources=found,
            free_shared_memory=free_shared_memory(), load=load(),
        )  # fmt: skip


def settle(options: Options) -> Settled:
    """Read what the user wrote, and the token.

    Raises:
        OptionInvalid: a seed, label, resource or name cannot be read.
        TokenError: there is no usable token.
        NodeCannotServe: such an address must not be listened on.
    """
    if not (0 < len(options.cluster) <= 128 and options.cluster.isprintable()):
        raise OptionInvalid(f"the cluster's name {options.cluster!r} is to have 1 to 128 printable characters")
    if options.drain_seconds < 0:
        raise OptionInvalid(f"--drain-seconds {options.drain_seconds:g}: write 0 or more seconds")
    seeds = tuple(parse_seed(text) for text in options.join)
    labels = {HOST_LABEL: socket.gethostname()[:256], **parse_labels(options.labels)}
    resources = parse_resources(options.resources)
    secret = token.load(options.token_file)
    if fault := may_listen(options.host, options.port, token=True, tls=True):
        raise NodeCannotServe(fault)
    return Settled(options, secret, seeds, labels, resources)
