"""One node of dora's dataflow; started by dora."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from benchmark import roles
from benchmark.model import Work
from benchmark.tally import PATIENCE, Source, Tally
from dora import Node


def values(node: Any) -> Iterator[int]:
    for array in arrays(node):
        yield array[0].as_py()


def arrays(node: Any) -> Iterator[Any]:
    while True:
        event = node.next(timeout=PATIENCE)
        if event is None or event["type"] == "STOP":
            raise TimeoutError
        if event["type"] == "INPUT":
            yield event["value"]
        elif event["type"] == "ERROR":
            raise TimeoutError
        del event


def frames(node: Any) -> Iterator[Any]:
    for array in arrays(node):
        yield array.to_numpy()


def produce(node: Any, work: Work) -> dict[str, Any] | None:
    total = work.n + work.warm
    if work.frames:
        source = Source(work.size, work.shape)
        for number in range(total):
            node.send_output("there", pa.array(source.stamp(number).reshape(-1).copy()))
    else:
        for value in range(total):
            node.send_output("there", pa.array((value,), pa.uint64()))
    next(arrays(node), None)  # stay until the other end has counted
    return None


def consume(node: Any, work: Work) -> dict[str, Any]:
    tally = Tally(work.n, work.warm)
    if work.frames:
        tally.frames(frames(node), Source(work.size, work.shape), work.touch, copy=not work.in_place)
    else:
        tally.values(values(node))
    return {"rate": tally.rate, "arrived": tally.arrived, "bad": tally.bad, "ended": tally.ended}


def ping(node: Any, work: Work) -> dict[str, Any]:
    roles.pin(work, 0)
    received = values(node)
    return roles.ping(
        lambda value: node.send_output("there", pa.array((value,), pa.uint64())), lambda: next(received), work
    )


def echo(node: Any, work: Work) -> None:
    roles.pin(work, 1)
    received = values(node)
    roles.echo(lambda: next(received), lambda value: node.send_output("back", pa.array((value,), pa.uint64())), work)


def main() -> None:
    order = json.loads(Path(os.environ["BENCH_ORDER"]).read_text())
    work = Work.from_json(order["work"])
    node = Node()
    found = {"produce": produce, "consume": consume, "ping": ping, "echo": echo}[os.environ["BENCH_ROLE"]](node, work)
    if found is not None:
        temporary = Path(order["into"] + ".new")
        temporary.write_text(json.dumps(found))
        temporary.rename(order["into"])
    time.sleep(0.05)


if __name__ == "__main__":
    main()
