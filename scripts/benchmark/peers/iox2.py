"""iceoryx2: publish and subscribe over shared memory, the subscriber polling, or blocked on an event of its own.

RetryUntilDelivered and no overflow: lossless, so far as it goes. It loses samples sent before a subscriber's first
receive(), so that comes before the start.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from typing import Any

import iceoryx2 as iox2

from benchmark.model import Work
from benchmark.peers.base import Array, Receiver, Sender, Transport
from benchmark.tally import PATIENCE, as_array

MOST = 1 << 13  # samples in the buffer; more makes no difference to its rate, and its set-up slow


class Iox2(Transport):
    """Option wait: sleep on an event per sample instead of polling."""

    fan = "native"

    def open(self, work: Work, channels: int) -> None:
        self.names = [f"bench/{os.getpid()}/{time.monotonic_ns()}/{one}" for one in range(channels)]
        self.slots = max(2, min(MOST, work.slots))

    def views(self, work: Work) -> bool:
        return True

    def _services(self, work: Work, channel: int) -> tuple[Any, Any, Any]:
        iox2.set_log_level(iox2.LogLevel.Fatal)
        node = iox2.NodeBuilder.new().create(iox2.ServiceType.Ipc)
        kind = iox2.Slice[ctypes.c_uint8] if work.frames else ctypes.c_uint64
        builder = node.service_builder(iox2.ServiceName.new(self.names[channel])).publish_subscribe(kind)
        builder = builder.subscriber_max_buffer_size(self.slots).enable_safe_overflow(False).history_size(0)
        data = builder.max_subscribers(max(8, work.consumers)).open_or_create()
        if not self.options.get("wait"):
            return node, data, None
        event = node.service_builder(iox2.ServiceName.new(self.names[channel] + "/event")).event()
        return node, data, event.max_listeners(max(8, work.consumers)).open_or_create()

    def sender(self, work: Work, channel: int = 0) -> Sender:
        node, data, event = self._services(work, channel)
        builder = data.publisher_builder().backpressure_strategy(iox2.BackpressureStrategy.RetryUntilDelivered)
        if work.frames:
            builder = builder.initial_max_slice_len(work.size)
        return Iox2Sender(node, builder.create(), event.notifier_builder().create() if event else None)

    def receiver(self, work: Work, channel: int = 0) -> Receiver:
        node, data, event = self._services(work, channel)
        subscriber = data.subscriber_builder().buffer_size(self.slots).create()
        return Iox2Receiver(node, subscriber, event.listener_builder().create() if event else None)


class Iox2Sender(Sender):
    def __init__(self, node: Any, publisher: Any, notifier: Any) -> None:
        self.node, self.publisher, self.notifier = node, publisher, notifier
        self.notify = notifier.notify if notifier else None

    def put(self, value: int) -> None:
        self.publisher.send_copy(ctypes.c_uint64(value))
        if self.notify:
            self.notify()

    def put_all(self, values: range) -> None:
        send, notify, word = self.publisher.send_copy, self.notify, ctypes.c_uint64
        if notify is None:
            for value in map(word, values):
                send(value)
            return
        for value in map(word, values):
            send(value)
            notify()

    def put_frame(self, frame: Array) -> None:
        sample = self.publisher.loan_slice_uninit(frame.nbytes)
        ctypes.memmove(sample.payload().as_ptr(), frame.ctypes.data, frame.nbytes)
        sample.assume_init().send()
        if self.notify:
            self.notify()


class Iox2Receiver(Receiver):
    def __init__(self, node: Any, subscriber: Any, listener: Any) -> None:
        self.node, self.subscriber, self.listener = node, subscriber, listener
        self.patience = iox2.Duration.from_millis(int(PATIENCE * 1000))
        subscriber.receive()  # connects it

    def _next(self) -> Any:
        """The next sample, waiting for it."""
        receive = self.subscriber.receive
        sample = receive()
        if sample is not None:
            return sample
        deadline = time.monotonic() + PATIENCE
        spins = 0
        while True:
            if self.listener is not None:
                self.listener.timed_wait(self.patience)
            sample = receive()
            if sample is not None:
                return sample
            spins += 1
            if (self.listener is not None or spins % 1024 == 0) and time.monotonic() > deadline:
                raise TimeoutError

    def get(self) -> int:
        return ctypes.c_uint64.from_address(self._next().payload_ptr).value

    def values(self) -> Iterator[int]:
        receive, wait, at = self.subscriber.receive, self._next, ctypes.c_uint64.from_address
        while True:
            sample = receive() or wait()
            yield at(sample.payload_ptr).value

    def frames(self) -> Iterator[Array]:
        while True:
            sample = self._next()
            payload = sample.payload()
            yield as_array(payload.as_memory_view())
            sample.delete()
