"""pynng: PUSH and PULL over ipc."""

from __future__ import annotations

import os
import tempfile

import pynng

from benchmark.model import Work
from benchmark.peers.base import Receiver, Sender, Transport
from benchmark.peers.messages import MessageReceiver, MessageSender
from benchmark.tally import PATIENCE, silence

LARGEST = 8192  # messages in a buffer of nng
silence(pynng.exceptions.Timeout)


class Nng(Transport):
    def open(self, work: Work, channels: int) -> None:
        folder = tempfile.mkdtemp(prefix="bench-nng-")
        self.addresses = [f"ipc://{os.path.join(folder, str(one))}" for one in range(channels)]

    def _marks(self, work: Work) -> int:
        return max(1, min(LARGEST, work.slots // 2))

    def sender(self, work: Work, channel: int = 0) -> Sender:
        return MessageSender(pynng.Push0(listen=self.addresses[channel], send_buffer_size=self._marks(work)))

    def receiver(self, work: Work, channel: int = 0) -> Receiver:
        socket = pynng.Pull0(recv_buffer_size=self._marks(work), recv_max_size=0, recv_timeout=int(PATIENCE * 5000))
        socket.dial(self.addresses[channel], block=False)
        return MessageReceiver(socket)
