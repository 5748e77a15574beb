"""News, and the digest."""

from __future__ import annotations

from msgspec.structs import replace

from upipe.cluster.member import News, digest
from upipe.cluster.messages import NodeInfo

INFO = NodeInfo("a" * 16, "here", ("10.0.0.1",), 7420, 1 << 32)
OTHER = replace(INFO, node_id="b" * 16)


def test_equal_lists_have_equal_digests_whatever_the_order_and_the_load() -> None:
    assert digest([INFO, OTHER]) == digest([replace(OTHER, load=3.0), INFO])
    assert digest([INFO]) != digest([INFO, OTHER])
    assert digest([INFO]) != digest([replace(INFO, incarnation=INFO.incarnation + 1)])


def test_news_is_told_so_often_and_the_least_told_first() -> None:
    news = News(retransmit=4.0)
    news.note("a", 9)
    for _ in range(3):
        assert news.pick(5) == ["a"]
        news.told(["a"])
    news.note("b", 9)
    assert news.pick(1) == ["b"]
    assert news.pick(5) == ["b", "a"]
    news.told(["a"])
    assert news.pick(5) == ["b"]
    news.drop("b")
    assert not news.pending


def test_news_to_a_small_cluster_is_told_more_than_once() -> None:
    news = News(retransmit=4.0)
    news.note("a", 1)
    news.told(["a"])
    assert news.pending
    news.told(["a", "never noted"])
    assert not news.pending
