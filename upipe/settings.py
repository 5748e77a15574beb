"""Every knob, with its unit, its default and what turning it costs.

Frozen structs: a setting is chosen once and travels unchanged to each worker.
"""

from __future__ import annotations

import msgspec

KIB = 1024
MIB = 1024 * KIB

DEFAULT_QUEUE_BYTES = 4 * MIB
"""Ring of a stand-alone MemQ, in bytes. Larger rides out longer pauses of the consumer and leaves the cache sooner."""

DEFAULT_CPU = 0.1
"""Cores a worker is counted with when it asks for none. Small, since most workers wait for frames most of the time:
what really computes says so, resources={"cpu": 1}."""

DEFAULT_EDGE_BYTES = 32 * MIB
"""Ring of one edge of a pipe, in bytes: five 1080p RGB frames. Shared memory is taken at start, not on use."""


class RestartPolicy(msgspec.Struct, frozen=True):
    """When a worker that died is replaced, and when the pipe gives up.

    The first restart inside the window is immediate; the n-th waits
    ``min(backoff_max, backoff * 2 ** (n - 2))`` seconds.
    """

    limit: int = 10
    """Deaths of one processor's workers inside the window before the pipe fails; 0 means no limit. What fails at each
    start must get there: with these waits it dies 17 times a minute, and fails after 20 s."""
    window: float = 60.0
    """Seconds over which deaths are counted."""
    backoff: float = 0.05
    """Seconds before the second restart inside the window; doubles each time."""
    backoff_max: float = 5.0
    """Longest wait in seconds between a death and its restart."""


class AutoscalePolicy(msgspec.Struct, frozen=True):
    """How the number of workers follows the load (both ways, with hysteresis)."""

    up_depth: float = 0.5
    """Share of the input ring in use (0..1) above which a worker is added."""
    up_age: float = 0.25
    """Age in seconds of the oldest waiting frame above which a worker is added."""
    down_idle: float = 2.0
    """Seconds with the input nearly empty before one worker is drained."""
    interval: float = 0.2
    """Seconds between two decisions while the pipe runs: shorter reacts faster, and flaps sooner."""


class Place(msgspec.Struct, frozen=True):
    """Where the workers of a processor may run on a cluster; on one host it says nothing. Everything given must hold.

        Processor("detect", detect, workers=6, resources={"gpu": 1}, place=Place(labels=("zone=a",), how="spread"))
    """

    labels: tuple[str, ...] = ()
    """Labels a node must have: "key=value", or "key" for any value."""
    hosts: tuple[str, ...] = ()
    """The only nodes it may run on, by node id or host name; () is any."""
    near: tuple[str, ...] = ()
    """Processors of which a worker must run on the same node, for each of these."""
    apart: tuple[str, ...] = ()
    """Processors that must not share a node with it; its own name: at most one of its workers on a node."""
    how: str = "pack"
    """"pack": as few nodes as hold it, beside those it exchanges frames with. "spread": equally many on each node that
    fits, which costs frames over the network and loses less with a node."""


class Certificates(msgspec.Struct, frozen=True):
    """Certificates of your own for a cluster, instead of those that are derived from its token: paths on this host.

        await pipe.start(cluster="node-a.example.org:7420", certificates=Certificates("ca.pem", "me.pem", "me.key"))

    The CA is to sign the nodes and clients of this cluster, and nothing else.
    """

    ca: str
    """PEM of the CA."""
    certificate: str
    """PEM of this process's or host's certificate, with the chain below it if there is one."""
    key: str
    """PEM of its key, without a passphrase, mode 0600."""


class Settings(msgspec.Struct, frozen=True):
    """Knobs of one pipe. ``Pipe(name, settings=Settings(...))``."""

    edge_bytes: int = DEFAULT_EDGE_BYTES
    """Default ring size of an edge, bytes."""
    emit_wait: float = 0.1
    """Seconds that emit() waits for room before it returns False. Short: the caller decides what to do next."""
    max_deliveries: int = 5
    """Deliveries of one frame before it goes to the dead letters."""
    dead_letter_bytes: int = 256 * MIB
    """Bytes of dead letters kept; the pipe fails rather than lose one beyond it."""
    restart: RestartPolicy = RestartPolicy()
    autoscale: AutoscalePolicy = AutoscalePolicy()
    stopped_grace: float = 1.0
    """Seconds a worker may be stopped (SIGSTOP) before it is killed and replaced."""
    stop_deadline: float = 3.0
    """Seconds for workers to end on stop() before they are killed."""
    drain_deadline: float = 30.0
    """Default seconds for terminate() to drain."""
    start_deadline: float = 30.0
    """Seconds for all workers to report ready after start()."""
    start_method: str = "auto"
    """Fork server start: "fork" (from this process, milliseconds), "exec" (clean interpreter), or "auto":
    fork when this process has a single Python thread, exec otherwise."""
    allow_pickle: bool | None = None
    """False refuses pickled frames everywhere in the pipe, True takes them. None: taken on one host, refused on a
    cluster, where frames come from other hosts and unpickling runs what stands in them."""
    sink_bytes: int = 8 * MIB
    """Ring for what end processors emit, bytes; grown to the largest edge."""
