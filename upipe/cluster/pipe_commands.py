"""What schedulers command, done: records to disk, messages and orders to agents, news to the submitting process."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from upipe.cluster import wire
from upipe.cluster.dealings import Arrange, Command, Message, Save, Send, TellClient
from upipe.cluster.known_pipes import Entry
from upipe.cluster.ledger import Ledger
from upipe.cluster.outbox import Outbox
from upipe.cluster.peers import Peers
from upipe.cluster.routes import DEAL, ORDERS
from upipe.errors import NodeRefused

SAVE_AGAIN = 1.0
SAY_SECONDS = 5.0
"""For one message to another agent."""
log = logging.getLogger("upipe.cluster")


class PipeCommands:
    """Does them for one agent. Owns what is on its way to other agents, which close() gives up.

    Args:
        me: node id of this agent.
        ledger: records on disk.
        peers: the other agents.
        arrange: follows orders for this node.
        tell: told sentences for the user.
    """

    def __init__(
        self, me: str, ledger: Ledger, peers: Peers, arrange: Callable[[str, wire.Orders], None],
        tell: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.me = me
        self._ledger = ledger
        self._peers = peers
        self._arrange_here = arrange
        self._tell = tell
        self._deals = Outbox(self._deal)
        self._orders = Outbox(self._order, most=1)

    async def close(self) -> None:
        """End. Idempotent."""
        await self._deals.close()
        await self._orders.close()

    async def do(self, entry: Entry, command: Command) -> None:
        """One command of one pipe, to its end; a record that the disk refuses is tried again."""
        record = entry.record
        if isinstance(command, Save):
            await self._save(command)
        elif isinstance(command, Send):
            self._deals.send(command.node, record.id, command.message)
        elif isinstance(command, TellClient):
            entry.desk.put(record.epoch, told=command)
            self._say(entry, command)
        else:
            self._arrange(entry, command)

    def _say(self, entry: Entry, told: TellClient) -> None:
        """Each state once, and what waits for room."""
        short = (told.state, told.waiting)
        if short != entry.said:
            entry.said = short
            more = "".join(f"; {one}" for one in (*told.reasons, told.waiting) if one)
            self._tell(f"pipe {entry.record.id} is {told.state}{more}")

    def _arrange(self, entry: Entry, command: Arrange) -> None:
        record = entry.record
        orders = wire.Orders(command.fence, command.plan, record.spec, record.shipment, self.me)
        if command.node == record.layout.client:
            entry.desk.put(record.epoch, orders=orders)
        else:
            self.order(command.node, record.id, orders)

    def order(self, node: str, pipe: str, orders: wire.Orders) -> None:
        """Orders for a node, this one too."""
        if node == self.me:
            with suppress(NodeRefused):  # newer orders are known: we shall hear that another one coordinates
                self._arrange_here(pipe, orders)
        else:
            self._orders.send(node, pipe, orders)

    async def _save(self, saved: Save) -> None:
        failed = False
        while True:
            try:
                await asyncio.to_thread(self._ledger.save, saved)
                return
            except OSError as error:
                if not failed:
                    log.error("the record of pipe %s cannot be written, and it waits: %s (make room on the disk of %s)",
                              saved.record.id, error, self._ledger.directory)  # fmt: skip
                failed = True
            await asyncio.sleep(SAVE_AGAIN)

    async def _deal(self, node: str, pipe: str, message: Message) -> None:
        await self._peers.call(node, DEAL, wire.Deal(message), seconds=SAY_SECONDS, pipe=pipe)

    async def _order(self, node: str, pipe: str, orders: wire.Orders) -> None:
        await self._peers.call(node, ORDERS, orders, seconds=SAY_SECONDS, pipe=pipe)
