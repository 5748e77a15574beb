"""A program as users run it, but for one thing: python altered.py HOW PROGRAM [ARGUMENT...]

PROGRAM is "upipe-node" or a script. HOW:

    other-version   speaks another version of uPipe
    short-lived     its certificates live for LIFE seconds and are renewed after RENEW, and it looks often whether one's
                    own were replaced. SIGUSR1 cuts every connection of an agent, for mirrors and for questions
"""

import asyncio
import runpy
import signal
import sys
from datetime import timedelta

import msgspec

from upipe.cluster import agent, options, tls

LIFE, RENEW, LOOK = 8.0, 1.0, 0.25


def other_version():
    told = options.Settled.info

    def info(self, *arguments):
        return msgspec.structs.replace(told(self, *arguments), protocol=9, version="9.9.9")

    options.Settled.info = info


def short_lived():
    tls.SKEW, tls.LIFE, tls.RENEW = timedelta(0), timedelta(seconds=LIFE), timedelta(seconds=RENEW)
    agent.RENEW_EVERY = LOOK
    start = agent.Agent.start

    async def starting(self):
        await start(self)
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, cut, self)

    agent.Agent.start = starting


def cut(one):
    for node in one.neighbours.live():
        one.lines.forget(node)
    closing = [asyncio.ensure_future(client.close()) for client in one.neighbours.peers._clients.values()]
    print(f"cut {len(closing)}", flush=True)


if __name__ == "__main__":
    {"other-version": other_version, "short-lived": short_lived}[sys.argv[1]]()
    program, sys.argv = sys.argv[2], sys.argv[2:]
    if program == "upipe-node":
        from upipe.cli.node import main

        main()
    else:
        runpy.run_path(program, run_name="__main__")
