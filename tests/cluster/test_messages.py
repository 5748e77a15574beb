"""One door: what fits comes back equal, what does not is refused with a sentence."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from upipe.cluster import messages
from upipe.cluster.messages import (
    Accepted,
    Gossip,
    Gpu,
    Join,
    Leave,
    NodeInfo,
    NodeMessage,
    Refused,
    Relay,
    Resources,
    Rumour,
)
from upipe.errors import MessageInvalid

INFO = NodeInfo(
    "a" * 16,
    "here",
    ("10.0.0.1", "fd00::1"),
    7420,
    (3 << 32) + 5,
    labels={"zone": "eu"},
    resources=Resources(2.5, 1 << 34, (Gpu(0, "T4", 1 << 34),), {"licence": 2.0}),
)
OTHER = msgspec.structs.replace(INFO, node_id="b" * 16)
MESSAGES: list[NodeMessage] = [
    Join(INFO),
    Gossip(INFO, 7, (Rumour(OTHER, "suspect"),)),
    Accepted(Gossip(INFO, 7)),
    Refused("cluster-name", "no"),
    Relay("b" * 16, Gossip(INFO, 7)),
    Leave("a" * 16, 5),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda one: type(one).__name__)
def test_what_goes_out_comes_in(message: NodeMessage) -> None:
    assert messages.decode(messages.encode(message)) == message


@pytest.mark.parametrize("message", MESSAGES, ids=lambda one: type(one).__name__)
def test_truncated_is_refused_at_every_length(message: NodeMessage) -> None:
    data = messages.encode(message)
    for length in range(len(data)):
        with pytest.raises(MessageInvalid):
            messages.decode(data[:length])


@given(st.binary(max_size=200))
def test_rubbish_is_refused(data: bytes) -> None:
    with pytest.raises(MessageInvalid):
        messages.decode(data)


@pytest.mark.parametrize(
    "changes",
    [
        {"node_id": "A" * 16},
        {"node_id": "a" * 15},
        {"node_id": "a" * 16 + "\n"},
        {"cluster": ""},
        {"cluster": "x" * 129},
        {"hosts": ("10.0.0.1",) * 17},
        {"port": 65536},
        {"port": -1},
        {"incarnation": -1},
        {"incarnation": 1 << 62},
        {"labels": {f"k{number}": "v" for number in range(65)}},
        {"labels": {"k": "v" * 257}},
        {"load": -1.0},
        {"free_shared_memory": -1},
        {"resources": Resources(gpus=(Gpu(0),) * 65)},
    ],
)
def test_out_of_bounds_is_refused(changes: dict[str, object]) -> None:
    data = messages.encode(Join(msgspec.structs.replace(INFO, **changes)))
    with pytest.raises(MessageInvalid, match="cannot be read"):
        messages.decode(data)


def test_nothing_too_large_is_read() -> None:
    with pytest.raises(MessageInvalid, match="larger than"):
        messages.decode(bytes(messages.MAX_MESSAGE + 1))


def test_a_list_too_long_goes_out_in_part() -> None:
    labels = {f"k{number}": "v" * 256 for number in range(64)}
    rumours = tuple(
        Rumour(msgspec.structs.replace(INFO, node_id=f"{n:016x}", labels=labels), "alive") for n in range(200)
    )
    for message in (Gossip(INFO, 7, rumours), Accepted(Gossip(INFO, 7, rumours))):
        data = messages.encode(message)
        assert messages.MAX_MESSAGE // 3 < len(data) <= messages.MAX_MESSAGE
        back = messages.decode(data)
        gossip = back.gossip if isinstance(back, Accepted) else back
        assert isinstance(gossip, Gossip)
        assert rumours[: len(gossip.rumours)] == gossip.rumours


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(MessageInvalid, match="larger than"):
        messages.encode(Refused("code", "x" * messages.MAX_MESSAGE))


def test_lives_and_addresses() -> None:
    assert INFO.life == 3
    assert [str(one) for one in INFO.addresses] == ["10.0.0.1:7420", "[fd00::1]:7420"]
