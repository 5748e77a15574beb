"""A process that advertises and browses, for the tests in network namespaces: a JSON line for each thing it notices.

python -m tests.cluster.advertiser NODE_ID CLUSTER [uvloop]      ends when its standard input does
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys

import uvloop
from msgspec.structs import replace

from upipe.cluster import multicast
from upipe.cluster.discovery import Multicast
from upipe.cluster.interfaces import reachable_at
from upipe.cluster.member_events import Hint
from upipe.cluster.messages import NodeInfo


def say(**words: object) -> None:
    print(json.dumps(words), flush=True)


async def main(node_id: str, cluster: str) -> None:
    logging.basicConfig(level=logging.WARNING)
    info = NodeInfo(node_id, cluster, reachable_at("::"), 7420, 1 << 32, version="0.1.0", fingerprint="ab" * 32)

    def found(hint: Hint) -> None:
        say(found=hint.node_id, cluster=hint.cluster, protocol=hint.protocol, fingerprint=hint.fingerprint,
            addresses=[str(one) for one in hint.addresses])  # fmt: skip

    def changed() -> None:
        say(changed=list(reachable_at("::")))
        updates.append(asyncio.ensure_future(service.update(replace(info, hosts=reachable_at("::")))))

    updates: list[asyncio.Future[None]] = []
    service = Multicast(found, changed)
    say(problems=await multicast.local_problems(), refused=await service.start(info))
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    await reader.read()
    await service.close()
    say(closed=True)


if __name__ == "__main__":
    run = uvloop.run if sys.argv[3:] == ["uvloop"] else asyncio.run
    run(main(*sys.argv[1:3]))
