"""Options are read before anything is opened."""

from __future__ import annotations

import socket

import pytest

from upipe.cluster import token
from upipe.cluster.messages import Resources
from upipe.cluster.node_id import Identity
from upipe.cluster.options import Options, settle
from upipe.errors import NodeCannotServe, OptionInvalid, TokenError


def options(folder, **more):
    path = folder / "token"
    if not path.exists():
        token.create(path)
    return Options(**{"token_file": path, "data_dir": folder / "data", **more})


def test_what_is_settled(tmp_path):
    more = {"labels": ("zone=eu,disk=ssd",), "resources": ("gpu=2",)}
    settled = settle(options(tmp_path, join=("10.0.0.1", "dns://x:1"), **more))
    assert [str(seed) for seed in settled.seeds] == ["10.0.0.1:7420", "dns://x:1"]
    assert settled.labels == {"host": socket.gethostname(), "zone": "eu", "disk": "ssd"}
    info = settled.info(Identity("0" * 15 + "a", 3), 7420, Resources(cpu=2))
    assert (info.life, info.hosts, info.cluster) == (3, ("127.0.0.1",), "upipe")
    assert info.fingerprint == settled.secret.fingerprint
    assert settled.credentials(info.node_id).identity.id == info.node_id
    assert not (tmp_path / "data").exists()


def test_a_host_label_of_the_users_wins(tmp_path):
    assert settle(options(tmp_path, labels=("host=h1",))).labels["host"] == "h1"


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ({"cluster": ""}, OptionInvalid),
        ({"cluster": "a\nb"}, OptionInvalid),
        ({"join": ("a:b",)}, OptionInvalid),
        ({"drain_seconds": -1.0}, OptionInvalid),
        ({"resources": ("x=y",)}, OptionInvalid),
    ],
)
def test_what_cannot_be(tmp_path, more, error):
    with pytest.raises(error):
        settle(options(tmp_path, **more))


def test_without_a_token_nothing_is_served(tmp_path):
    with pytest.raises((TokenError, NodeCannotServe)):
        settle(Options(host="0.0.0.0", token_file=tmp_path / "none"))
