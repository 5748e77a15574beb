"""Submitting a pipe to an agent: contents first, each only where it is missing, then the pipe itself."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence

from upipe.cluster import wire
from upipe.cluster.client import Client
from upipe.cluster.reach import Reached
from upipe.cluster.routes import HAS_CODE, PUT_CODE, SUBMIT
from upipe.cluster.shipping import load_freight
from upipe.errors import DeclarationError, NodeRefused
from upipe.graph.spec import PipeSpec
from upipe.processor import Processor

JOB_VARIABLE = "UPIPE_JOB"
"""In the environment of a submitted script: NODE/JOB, which travels with its pipes, so that they end with it."""
log = logging.getLogger("upipe.cluster")
_NEVER = frozenset({"no_room", "no_pipe"})
"""Codes of refusals that are about what was declared."""


async def submit(
    reached: Reached, id: str, spec: PipeSpec, codes: dict[str, bytes], processors: Sequence[Processor]  # noqa: A002
) -> wire.PipeInfo:
    """Ask the agent to run the pipe, and to coordinate it.

    Raises:
        DeclarationError: something cannot travel, or the pipe finds no room, with the reason for each node.
        ClusterError: the agent is gone, or says no.
    """
    freight = load_freight(processors, codes)
    async with reached.client() as client:
        await upload(client, freight.contents.items())
        me = reached.credentials.identity.id
        request = wire.PipeRequest(id, spec, freight.shipment, me, os.environ.get(JOB_VARIABLE, ""))
        try:
            info = await client.call(SUBMIT, request)
        except NodeRefused as error:
            if error.code in _NEVER:
                raise DeclarationError([error.sentence], f"pipe {spec.name!r} on this cluster") from None
            raise
    if len(reached.addresses) > 1 and (told := forgotten(processors)):
        log.warning("pipe %r: %s", spec.name, told)
    return info


def forgotten(processors: Sequence[Processor]) -> str:
    """What restarts of workers keep, and the death of a node does not: said to who asked for it; "" when nobody did."""
    resumed = [one.name for one in processors if one.resume]
    stateful = [one.name for one in processors if isinstance(one.func, type) and hasattr(one.func, "checkpoint")]
    told = []
    if resumed:
        told.append(f"{', '.join(map(repr, resumed))} (resume=True) from the first value")
    if stateful:
        told.append(f"{', '.join(map(repr, stateful))} without its checkpoint")
    if not told:
        return ""
    return f"when a node dies or drains, what ran there begins anew on another one: {'; '.join(told)}"


async def upload(client: Client, contents: Iterable[tuple[str, bytes]]) -> None:
    """Send what the agent does not hold yet."""
    for digest, data in contents:
        try:
            await client.fetch(HAS_CODE, sha256=digest)
        except NodeRefused as error:
            if error.status != 404:
                raise
            await client.upload(PUT_CODE, data, sha256=digest)
