"""One TLS connection over TCP: Python's ssl on blocking sockets, with the certificates and the cipher of uPipe's nodes.

What a mirror does over the same cable costs encryption, and a plain TCP socket does not pay that: this one does.
"""

from __future__ import annotations

import ssl

from benchmark.model import Work
from benchmark.peers.base import Receiver, Sender
from benchmark.peers.sockets import WORD, SocketReceiver, Sockets, SocketSender


class TlsSockets(Sockets):
    """The handshake is made where the ends are used: both roles make theirs before they meet at the gate."""

    def open(self, work: Work, channels: int) -> None:
        from upipe.cluster import tls
        from upipe.cluster.token import Secret

        credentials = tls.issue(Secret(bytes(32)), tls.Identity("node", "0123456789abcdef"))
        self.contexts = tls.client_context(credentials), tls.server_context(credentials)
        self.name = credentials.expected("", credentials.identity.id)
        super().open(work, channels)

    def sender(self, work: Work, channel: int = 0) -> Sender:
        return SocketSender(self.contexts[0].wrap_socket(self.pairs[channel][0], server_hostname=self.name))

    def receiver(self, work: Work, channel: int = 0) -> Receiver:
        return TlsReceiver(self.contexts[1].wrap_socket(self.pairs[channel][1], server_side=True), work.size)


class TlsReceiver(SocketReceiver):
    """Without MSG_WAITALL, which ssl has not."""

    end: ssl.SSLSocket

    def get(self) -> int:
        data = b""
        while len(data) < WORD.size:
            some = self.end.recv(WORD.size - len(data))
            if not some:
                raise EOFError("the sender has ended")
            data += some
        value: int = WORD.unpack(data)[0]
        return value
