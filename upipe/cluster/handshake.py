"""Who may join: the checks of a Join that need no cryptography. Pure, with a sentence for each refusal."""

from __future__ import annotations

from upipe.cluster.messages import NodeInfo, Refused


def judge(own: NodeInfo, other: NodeInfo) -> Refused | None:
    """Why `other` cannot be a member of our cluster, or None. Both sides of a handshake ask."""
    if other.cluster != own.cluster:
        return Refused(
            "cluster-name",
            f"node {other.node_id} at {_where(other)} belongs to cluster {other.cluster!r}, node "
            f"{own.node_id} to {own.cluster!r}; give both the same --cluster, or remove it from --join",
        )
    if (other.protocol, other.layout) != (own.protocol, own.layout):
        older = min(other, own, key=lambda one: (one.protocol, one.layout))
        return Refused(
            "protocol-version",
            f"node {other.node_id} at {_where(other)} runs uPipe {_version(other)}, node {own.node_id} "
            f"{_version(own)}; update node {older.node_id}",
        )
    if other.node_id == own.node_id and not _same(own, other):
        return Refused(
            "node-id-taken",
            f"another agent at {_where(other)} runs under our node id {own.node_id}: a data directory was copied; "
            "stop one of the two and remove node_id and life from its --data-dir",
        )
    return None


def _same(own: NodeInfo, other: NodeInfo) -> bool:
    """Whether it is really us (we dialled ourselves): a cloned machine has our id, and often our life too."""
    return other.life == own.life and other.port == own.port and bool(set(other.hosts) & set(own.hosts))


def _version(info: NodeInfo) -> str:
    return f"{info.version or 'of unknown version'} (protocol {info.protocol}, layout {info.layout})"


def _where(info: NodeInfo) -> str:
    return str(info.addresses[0]) if info.addresses else f"port {info.port}"
