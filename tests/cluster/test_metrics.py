"""What Prometheus reads, and how much of it at most."""

from __future__ import annotations

from upipe.cluster import metrics as module
from upipe.cluster.dealings import TellClient
from upipe.cluster.messages import NodeInfo
from upipe.cluster.metrics import Metrics
from upipe.cluster.record import Books, Crew
from upipe.cluster.wire import Member, MirrorInfo, PipeInfo

INFO = NodeInfo("0" * 16, "test", ("127.0.0.1",), 7420, 1, load=1.5, free_shared_memory=1000)


def made(pipes=(), mirrors=()) -> list[str]:
    members = [Member(INFO, "alive"), Member(INFO, "dead")]
    return Metrics(lambda: INFO, lambda: members, lambda: pipes, lambda: mirrors).text().decode().splitlines()


def pipe(name: str) -> PipeInfo:
    told = TellClient("running", books={"e0": Books(10, 8, 1, 1, 0, 2, 80)}, crews={"a": Crew(2, 3, 0.5, 1)})
    return PipeInfo(name, name, 1, "n", told)


def test_everything_has_its_number():
    mirrors = (MirrorInfo("p:e0@n", "source", 1, "n", 30, 20, 10), MirrorInfo("p:e1@n", "sink", 1, "n", 30, 20, 10))
    text = made((pipe("p"),), mirrors)
    for line in (
        'upipe_nodes{state="alive"} 1.0',
        'upipe_nodes{state="dead"} 1.0',
        'upipe_pipes{state="running"} 1.0',
        "upipe_node_load 1.5",
        "upipe_shared_memory_free_bytes 1000.0",
        'upipe_stream_frames_emitted_total{pipe="p",stream="e0"} 10.0',
        'upipe_stream_frames_redelivered_total{pipe="p",stream="e0"} 2.0',
        'upipe_stream_bytes_total{pipe="p",stream="e0"} 80.0',
        'upipe_workers{pipe="p",processor="a"} 2.0',
        'upipe_worker_restarts_total{pipe="p",processor="a"} 3.0',
        'upipe_dead_letters{pipe="p",processor="a"} 1.0',
        'upipe_mirror_lag_bytes{mirror="p:e0@n"} 10.0',
        'upipe_mirror_lag_bytes{mirror="p:e1@n"} 0.0',
        "upipe_series_left_out 0.0",
    ):
        assert line in text, line


def test_many_pipes_do_not_make_many_series(monkeypatch):
    monkeypatch.setattr(module, "MOST_SERIES", 3)
    text = made(tuple(pipe(f"p{number}") for number in range(5)))
    assert sum(line.startswith("upipe_workers{") for line in text) == 3
    assert "upipe_series_left_out 4.0" in text
    assert 'upipe_pipes{state="running"} 5.0' in text
