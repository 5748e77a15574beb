"""Count primes on all hosts of a cluster, and say which process counted how many.

    ranges ──[first, last]──▶ count × n ──[host, process, primes]──▶ this script

Nothing here knows of a cluster: `python primes.py` runs it on this host, `upipe submit primes.py` on the hosts of the
cluster. Records are lists, since a cluster takes tuples (which are pickled) only with Settings(allow_pickle=True).
"""

import argparse
import asyncio
import os
import socket
import sys
from collections import Counter

from upipe import Pipe, Place, Processor
from upipe.cli.render import show

STEP = 20_000


def ranges(*, config: int):
    for first in range(0, config, STEP):
        yield [first, min(first + STEP, config)]


def count(part: list[int]) -> list[object]:
    first, last = part
    sieve = bytearray(number > 1 for number in range(first, last))
    for number in range(2, int(last**0.5) + 1):
        multiples = range(max(number * number, -(-first // number) * number), last, number)
        sieve[multiples.start - first :: number] = bytes(len(multiples))
    return [socket.gethostname(), os.getpid(), sum(sieve)]


async def main(arguments: argparse.Namespace) -> int:
    pipe = Pipe("primes")
    pipe.chain(
        Processor("ranges", ranges, config=arguments.below, resume=True),
        Processor("count", count, workers=arguments.workers, place=Place(how="spread")),
    )
    found: Counter[tuple[str, int]] = Counter()
    async with pipe:
        async for host, process, primes in pipe.results():
            found[host, process] += primes
    report = pipe.report()
    show(report)
    print()
    for (host, process), primes in sorted(found.items()):
        print(f"{primes:9,} by process {process} on {host}")
    print(f"{found.total():9,} primes below {arguments.below:,}")
    return 0 if report.balanced else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--below", type=int, default=10_000_000, help="where to stop (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=4, help="processes that count (default: %(default)s)")
    sys.exit(asyncio.run(main(parser.parse_args())))
