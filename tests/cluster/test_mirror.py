"""Mirrors over real connections: real rings, real sockets, and a proxy that loses them."""

# ruff: noqa: ASYNC110 - the counters of a queue have no event to wait for

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import random
import ssl
from queue import Empty

import numpy as np
import pytest
import uvloop

from tests.cluster.linking import dial, server
from tests.cluster.proxy import Proxy
from tests.memq.helpers import kill
from upipe import MemQ
from upipe.cluster import mirror_end, pulse
from upipe.cluster.gate import Tail
from upipe.cluster.link import Link
from upipe.cluster.mirror import LINGER, MirrorSink, MirrorSource
from upipe.cluster.records import DATA, Hello, data_header, encode, mirror_key
from upipe.cluster.tail_watch import TailWatch
from upipe.errors import EndOfStream, MirrorRefused, QueueError, QueueStuck

SIZE = 1 << 16
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(params=["asyncio", "uvloop"], autouse=True)
def event_loop_policy(request):
    """Every test on both event loops: their transports differ."""
    return asyncio.DefaultEventLoopPolicy() if request.param == "asyncio" else uvloop.EventLoopPolicy()


class Pair:
    """A queue on two nodes: `put` here, `get` there; the mirrors can be replaced."""

    def __init__(self, size: int = SIZE, name: str = "m", **knobs) -> None:
        self.name = name
        self.source = MemQ(size, supervised=True, **knobs)
        self.source.declare_producer(0)
        self.put = MemQ.attach(self.source.name)
        self.put.use_producer(0)
        self.epoch = 0
        self.ends: list[MirrorSource | MirrorSink] = []
        self.copies: list[MemQ] = []
        self.done = asyncio.Event()
        self.failed: list[object] = []

    def mirror_source(self) -> MirrorSource:
        end = MirrorSource(MemQ.attach(self.source.name), self.name, max(1, self.epoch))
        end.on_done = lambda _: self.done.set()
        return self._keep(end)

    def fresh_copy(self) -> MemQ:
        """A sink copy for a new epoch."""
        self.epoch += 1
        start = self.source.mirror_source(self.epoch)
        self.copies.append(MemQ(self.source.capacity, supervised=True, start=start))
        self.copies[-1].declare_producer(0)
        return self.copies[-1]

    def mirror_sink(self, **knobs) -> MirrorSink:
        return self._keep(MirrorSink(MemQ.attach(self.copies[-1].name), self.name, self.epoch, **knobs))

    def _keep(self, end):
        end.on_failed = self.failed.append
        self.ends.append(end)
        return end

    def close(self) -> None:
        for end in self.ends:
            end.close()
        for q in (self.put, self.source, *self.copies):
            q.close()
            q.unlink()


@pytest.fixture
async def pairs():
    made: list[Pair] = []

    def make(*args, **knobs) -> Pair:
        made.append(Pair(*args, **knobs))
        return made[-1]

    yield make
    for pair in made:
        pair.close()


async def everything(q: MemQ) -> list:
    found = []
    while True:
        try:
            found.append(await q.aget())
        except EndOfStream:
            return found


async def emit(pair: Pair, values) -> None:
    for value in values:
        await pair.put.aput(value)
    pair.source.close_producer(0)


def same(found: list, values: list) -> bool:
    return len(found) == len(values) and all(
        np.array_equal(a, b) if isinstance(b, np.ndarray) else a == b for a, b in zip(found, values, strict=True)
    )


async def until(condition) -> None:
    """Let other tasks run until it is true; the test's deadline bounds it."""
    while not condition():
        await asyncio.sleep(0)


def mixed(count: int, seed: int = 1) -> list:
    chance = random.Random(seed)
    kinds = [int, lambda i: f"text {i}" * 5, lambda i: np.full(chance.randrange(9000), i % 251, "u1"), lambda _: None]
    return [chance.choice(kinds)(i) for i in range(count)]


def balanced(pair: Pair) -> bool:
    a, b = pair.source.stats(), pair.copies[-1].stats()
    alike = (a.finished, a.dropped, a.dead, a.tail) == (b.finished, b.dropped, b.dead, b.tail)
    return a.balanced and b.balanced and a.in_flight == 0 and alike


async def test_values_arrive_in_order_both_copies_balance_and_the_end_follows(pairs):
    pair, values = pairs(), mixed(2000)
    copy = pair.fresh_copy()
    sink, source = pair.mirror_sink(), pair.mirror_source()
    async with server(lambda link: link.add(sink)) as port:
        link = await dial(port)
        link.add(source)
        _, found = await asyncio.gather(emit(pair, values), everything(copy))
        await pair.done.wait()
        assert same(found, values)
        assert balanced(pair)
        link.close()


async def test_either_side_may_dial(pairs):
    pair, values = pairs(), list(range(500))
    copy = pair.fresh_copy()
    sink, source = pair.mirror_sink(), pair.mirror_source()
    async with server(lambda link: link.add(source)) as port:
        link = await dial(port)
        link.add(sink)
        _, found = await asyncio.gather(emit(pair, values), everything(copy))
        assert found == values
        await pair.done.wait()
        link.close()


async def test_a_frame_as_large_as_the_ring_passes(pairs):
    pair = pairs(1 << 20)
    copy = pair.fresh_copy()
    sink, source = pair.mirror_sink(), pair.mirror_source()
    values = [np.full((1 << 20) - 64, i, "u1") for i in range(3)]
    async with server(lambda link: link.add(sink)) as port:
        link = await dial(port)
        link.add(source)
        _, found = await asyncio.gather(emit(pair, values), everything(copy))
        assert same(found, values)
        link.close()


async def test_several_mirrors_share_a_connection_and_an_end_may_come_later(pairs):
    several = [pairs(name=f"m{i}") for i in range(5)]
    values = list(range(3000))
    for pair in several:
        pair.fresh_copy()
    links: list[Link] = []
    async with server(links.append) as port:
        link = await dial(port)
        for pair in several:
            link.add(pair.mirror_source())
        for pair in reversed(several):
            links[0].add(pair.mirror_sink())
        jobs = [work for pair in several for work in (emit(pair, values), everything(pair.copies[-1]))]
        results = await asyncio.gather(*jobs)
        assert all(found == values for found in results[1::2])
        link.close()


async def keep_dialled(port: int, joined, stop: asyncio.Event) -> None:
    """What an agent does: dial again when a link broke."""
    backoff = pulse.Backoff(random.random, pulse.BackoffPolicy(first=0.001, most=0.01))
    while not stop.is_set():
        with contextlib.suppress(OSError):
            link = await dial(port)
            backoff.succeeded()
            joined(link)
            await asyncio.wait({link.closed, asyncio.ensure_future(stop.wait())}, return_when="FIRST_COMPLETED")
            link.close()
        await asyncio.sleep(backoff.failed())


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(3))
async def test_links_cut_at_any_byte_and_ends_replaced_lose_and_repeat_nothing(pairs, seed):
    chance = random.Random(seed)
    pair, values, stop = pairs(), mixed(1500, seed), asyncio.Event()
    copy = pair.fresh_copy()
    now = {"sink": pair.mirror_sink(), "source": pair.mirror_source()}
    async with server(lambda link: link.add(now["sink"])) as port, Proxy("127.0.0.1", port) as proxy:
        links: list[Link] = []

        def joined(link: Link) -> None:
            links.append(link)
            link.add(now["source"])

        dialling = asyncio.create_task(keep_dialled(proxy.port, joined, stop))

        async def disturb() -> None:
            for _ in range(30):
                before = proxy.connections
                proxy.budget = chance.randrange(1, 60_000)
                await until(lambda before=before: proxy.connections != before or pair.done.is_set())
                if chance.random() < 0.3:  # as after kill -9 of an agent: another mirror goes on by position
                    side = chance.choice(["sink", "source"])
                    now[side].close()
                    now[side] = pair.mirror_sink() if side == "sink" else pair.mirror_source()
                    proxy.cut()
                    for link in links[-1:]:  # the proxy may not know it yet
                        link.close()
            proxy.budget = None

        disturbing = asyncio.create_task(disturb())
        _, found = await asyncio.gather(emit(pair, values), everything(copy))
        await pair.done.wait()
        assert same(found, values)
        assert balanced(pair)
        assert pair.source.stats().redelivered == 0
        assert proxy.connections > 5
        disturbing.cancel()
        stop.set()
        proxy.cut()
        await dialling


def run_agent(source: str, sink: str) -> None:
    """A process with both ends of a mirror in it, over a connection to itself, until it is killed."""

    async def agent() -> None:
        sending, receiving = MirrorSource(MemQ.attach(source), "m", 1), MirrorSink(MemQ.attach(sink), "m", 1)
        async with server(lambda link: link.add(receiving)) as own:
            link = await dial(own)
            link.add(sending)
            await link.closed

    asyncio.run(agent())


@pytest.mark.slow
@pytest.mark.chaos
async def test_kill_9_of_the_agents_pauses_the_flow_and_the_next_goes_on_by_position(pairs, child):
    pair, values, chance = pairs(), mixed(4000), random.Random(1)
    copy = pair.fresh_copy()
    copy.mirror_sink(1)
    emitting, found = asyncio.create_task(emit(pair, values)), []
    while len(found) < len(values):
        process = child(run_agent, pair.source.name, copy.name)
        for _ in range(min(chance.randrange(200, 900), len(values) - len(found))):
            found.append(await copy.aget())
        kill(process)
        for q in (pair.source, copy):
            q.recover_dead()
    await emitting
    child(run_agent, pair.source.name, copy.name)
    await until(lambda: pair.source.stats().in_flight == 0)
    await until(lambda: copy.ended)
    assert same(found, values)
    assert balanced(pair)
    assert copy.stats().redelivered == 0


async def test_a_silent_link_is_noticed_within_five_seconds(pairs, monkeypatch):
    monkeypatch.setattr(pulse, "QUIET", 0.05)
    monkeypatch.setattr(pulse, "PATIENCE", 0.1)
    links: list[Link] = []
    async with server(links.append) as port, Proxy("127.0.0.1", port) as proxy:
        link = await dial(proxy.port)
        assert not link.closed.done()
        proxy.stall()
        assert "no sign of life" in await link.closed
        assert "no sign of life" in await links[0].closed


async def test_a_lost_host_the_unfinished_go_to_another_copy_or_are_read_here(pairs):
    pair, values = pairs(), list(range(300))
    first = pair.fresh_copy()
    sink, source = pair.mirror_sink(), pair.mirror_source()
    sinks = {"now": sink}
    async with server(lambda link: link.add(sinks["now"])) as port:
        link = await dial(port)
        link.add(source)
        pair.put.put_many(values)
        found = [await first.aget() for _ in range(100)]
        await until(lambda: pair.source.stats().finished == 100)
        source.close()
        link.close()
        second = pair.fresh_copy()
        assert second.stats().tail == pair.source.stats().tail == first.stats().tail
        sinks["now"] = pair.mirror_sink()
        link = await dial(port)
        source = pair.mirror_source()
        link.add(source)
        found += [await second.aget() for _ in range(100)]
        await until(lambda: pair.source.stats().finished == 200)
        source.close()
        link.close()
        pair.source.mirror_local()
        found += [pair.source.get_nowait() for _ in range(100)]
        assert found == values
        stats = pair.source.stats()
        assert (stats.finished, stats.in_flight, stats.redelivered) == (300, 0, 0)
        with pytest.raises(MirrorRefused) as refused:
            MirrorSource(MemQ.attach(pair.source.name), "m", pair.epoch)
        assert refused.value.code == "stale-epoch"


async def test_an_old_epoch_is_refused_by_a_record_with_code_and_sentence(pairs):
    pair = pairs()
    pair.fresh_copy()
    pair.fresh_copy()
    sink, failed = pair.mirror_sink(), asyncio.get_running_loop().create_future()
    other = Pair(name="m")
    other.epoch = 1
    stale = other.mirror_source()
    stale.on_failed = failed.set_result
    async with server(lambda link: link.add(sink)) as port:
        link = await dial(port)
        link.add(stale)
        other.put.put(1)
        refusal = await failed
        assert refusal.code == "stale-epoch"
        assert "epoch 1" in refusal.text
        assert pair.copies[-1].stats().claimed == 0
        link.close()
    other.close()


async def test_a_gated_sink_tells_only_what_is_allowed(pairs):
    pair, settled = pairs(), asyncio.Queue()
    copy = pair.fresh_copy()
    sink, source = pair.mirror_sink(gated=True), pair.mirror_source()
    sink.on_settled = lambda end: settled.put_nowait(end.settled)
    async with server(lambda link: link.add(sink)) as port:
        link = await dial(port)
        link.add(source)
        pair.put.put_many(range(10))
        assert [await copy.aget() for _ in range(10)] == list(range(10))
        tail = Tail(0)
        while tail.position < 640:
            tail = await settled.get()
        await until(lambda: source.received == 640)
        assert pair.source.stats().finished == 0
        sink.allow(Tail(320))
        await until(lambda: pair.source.stats().finished == 5)
        link.close()


async def test_dropped_frames_and_padding_are_holes_and_both_copies_go_on(pairs):
    pair = pairs(4096, policy="latest")
    copy = pair.fresh_copy()
    sink, source = pair.mirror_sink(), pair.mirror_source()
    async with server(lambda link: link.add(sink)) as port:
        for i in range(5000):  # far more than the ring holds, while nobody listens
            pair.put.send(i)
        link = await dial(port)
        link.add(source)
        assert await copy.aget() == 4999
        with contextlib.suppress(ZeroDivisionError), pair.put.reserve(100):
            raise ZeroDivisionError
        pair.put.put(b"last")
        pair.source.close_producer(0)
        assert await everything(copy) == [b"last"]
        await pair.done.wait()
        assert pair.source.stats().balanced
        assert copy.stats().balanced
        link.close()


@pytest.mark.parametrize("what", ["skip", "close_producer", "publish", "retire", "outgoing"])
async def test_what_a_stopped_process_keeps_from_being_done_is_done_later(pairs, what, monkeypatch):
    """It holds a lock of the queue, so that an operation fails; the end of the stream is the worst moment."""
    monkeypatch.setattr(mirror_end, "AGAIN", 0.01)
    pair = pairs(4096, policy="latest")
    copy = pair.fresh_copy()
    sink, source = pair.mirror_sink(), pair.mirror_source()
    ring = source.ring if what in ("retire", "outgoing") else sink.ring
    assert ring.patience == mirror_end.PATIENCE, "the agent does not wait longer"
    real, stuck = getattr(ring, what), iter([True, True])

    def method(*args):
        if next(stuck, False):
            raise QueueStuck(f"{what} of a queue whose lock is held")
        return real(*args)

    monkeypatch.setattr(ring, what, method)
    async with server(lambda link: link.add(sink)) as port:
        for number in range(5000):  # most of them are a hole
            pair.put.send(number)
        pair.source.close_producer(0)
        link = await dial(port)
        link.add(source)
        assert (await everything(copy))[-1:] == [4999]
        await pair.done.wait()
        assert pair.source.stats().balanced
        assert copy.stats().balanced
        assert not pair.failed
        link.close()


async def test_malformed_data_is_refused_and_the_copy_unchanged(pairs):
    pair = pairs()
    copy = pair.fresh_copy()
    sink = pair.mirror_sink()
    key = mirror_key("m")
    async with server(lambda link: link.add(sink)) as port:
        link = await dial(port)
        link.say(Hello(key, 0, 1, 1, SIZE, 0, 0, 0, sink.machine.fingerprint, "m"))
        link.write(data_header(key, 0, 128) + bytes(128))
        await until(lambda: pair.failed)
        assert pair.failed[0].code == "malformed"
        assert copy.stats().head == 0
        assert not link.closed.done()
        link.write(b"\xff" * 64)
        await link.closed


async def test_a_sink_copy_takes_no_other_writer_and_a_source_copy_no_reader(pairs):
    pair = pairs()
    copy = pair.fresh_copy()
    pair.mirror_sink()
    with pytest.raises(QueueError, match="copy of a queue on another node"):
        copy.put(1)
    pair.put.put(1)
    with pytest.raises(Empty):
        pair.source.get_nowait()
    assert pair.source.stats().in_flight == 1


async def test_an_idle_mirror_does_nothing(pairs, monkeypatch):
    pair = pairs()
    copy = pair.fresh_copy()
    sink, source = pair.mirror_sink(), pair.mirror_source()
    async with server(lambda link: link.add(sink)) as port:
        link = await dial(port)
        link.add(source)
        pair.put.put(1)
        assert await copy.aget() == 1
        await until(lambda: pair.source.stats().finished == 1)
        calls = []
        await asyncio.sleep(5 * LINGER)  # the last glances of both ends are over
        monkeypatch.setattr(type(source), "_rung", lambda _: calls.append("source"))
        monkeypatch.setattr(TailWatch, "_look", lambda _: calls.append("sink"))
        await asyncio.sleep(20 * LINGER)
        assert calls == []
        link.close()


def certificate(directory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(1).not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    cert, secret = directory / "cert.pem", directory / "key.pem"
    cert.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    plain = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    secret.write_bytes(key.private_bytes(*plain))
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(cert, secret)
    return serving, ssl.create_default_context(cafile=str(cert))


@pytest.mark.slow
async def test_the_same_over_tls(pairs, tmp_path):
    serving, trusting = certificate(tmp_path)
    pair, values = pairs(1 << 20), [*mixed(500), np.full(900_000, 7, "u1")]
    copy = pair.fresh_copy()
    sink, source = pair.mirror_sink(), pair.mirror_source()
    async with server(lambda link: link.add(sink), serving) as port:
        link = await dial(port, tls=trusting)
        link.add(source)
        _, found = await asyncio.gather(emit(pair, values), everything(copy))
        await pair.done.wait()
        assert same(found, values)
        assert balanced(pair)
        link.close()


def test_constants_agree():
    assert encode(Hello(mirror_key("m"), 0, 1, 1, 64, 0, 0, 0, 1, "m"))[0] != DATA
