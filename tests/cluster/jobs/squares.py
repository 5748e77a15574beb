"""numbers -> square, on two nodes when there are two; prints how the books stand. --gpu: asks for what nobody has."""

import argparse
import asyncio

from upipe import Certificates, Pipe, Place, Processor


def numbers():
    yield from range(10)


def square(value):
    return value * value


async def main(arguments):
    pipe = Pipe("squares")
    needs = {"gpu": 1} if arguments.gpu else None
    where = Place(labels=(f"host={arguments.on}",) if arguments.on else (), how="spread")
    pipe.chain(
        Processor("numbers", numbers, place=Place(apart=("square",)) if arguments.apart else None),
        Processor("square", square, resources=needs, place=where),
    )
    own = Certificates(*arguments.own) if arguments.own else None
    await pipe.start(cluster=arguments.cluster, certificates=own)
    report = await pipe.wait_for_completion()
    print(report.state, report.edges[0].finished)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--cluster", default="auto")
    parser.add_argument("--on", default="")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--apart", action="store_true")
    parser.add_argument("--own", nargs=3)
    asyncio.run(main(parser.parse_args()))
