"""A process that advertises nodes which are none, as ones of our cluster, and writes down what it is told.

    python -m tests.cluster.liar ADDRESS FINGERPRINT FILE       until it is killed

One is at a port where nobody listens, one takes connections and never answers.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from upipe.cluster.discovery import Multicast
from upipe.cluster.messages import NodeInfo

NOBODY, SILENT = 7430, 7431


async def main(address: str, fingerprint: str, file: Path) -> None:
    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(4096):
            with file.open("ab") as heard:
                heard.write(data)

    server = await asyncio.start_server(take, address, SILENT)
    for number, port in enumerate((NOBODY, SILENT)):
        info = NodeInfo(f"{number:016x}", "test", (address,), port, 1 << 32, version="0.1.0", fingerprint=fingerprint)
        assert await Multicast(lambda hint: None).start(info) is None
    print("up", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
