"""hpcgpt.doctor.nodes.wire: requests and answers, over real sockets."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator

import pytest

from hpcgpt.doctor.nodes import wire
from hpcgpt.doctor.nodes.wire import Message, Peers


@pytest.fixture
def peers() -> Iterator[Peers]:
    found = Peers()
    yield found
    found.close()


def refuse(_: Message) -> Message:
    raise ValueError("a\nreason \x1b")


def join(peers: Peers, node: str, kind: str = "agent") -> threading.Thread:
    """Start a real peer in a thread."""
    connection = wire.connect(["127.0.0.1"], peers.port, 5)
    greeting = {"token": peers.token, "kind": kind, "node": node, "device": 0}
    actions = {"double": lambda request: {"twice": 2 * request["number"]}, "refuse": refuse}

    def run() -> None:
        with connection:
            wire.serve(connection, greeting, actions)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_several_peers_answer_at_the_same_time_and_errors_are_answers(peers: Peers) -> None:
    threads = [join(peers, "n1"), join(peers, "n2")]
    assert peers.wait(lambda: len(peers.agents()) == 2, 5)
    agents = peers.agents()
    answers = peers.ask({agents["n1"]: {"do": "double", "number": 4}, agents["n2"]: {"do": "refuse"}}, 5)
    assert answers[agents["n1"]] == {"id": 1, "ok": {"twice": 8}}
    assert answers[agents["n2"]] == {"id": 2, "error": "ValueError: a reason \\x1b"}
    assert "KeyError" in str(peers.ask({agents["n1"]: {"do": "nothing"}}, 5)[agents["n1"]])
    peers.close()
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()


def test_a_silent_peer_has_no_answer_and_one_that_leaves_is_gone(peers: Peers) -> None:
    silent = wire.connect(["127.0.0.1"], peers.port, 5)
    silent.sendall(json.dumps({"token": peers.token, "kind": "worker", "node": "n3", "device": 1}).encode() + b"\n")
    assert peers.wait(lambda: len(peers.workers()) == 1, 5)
    (worker,) = peers.workers()
    assert peers.ask({worker: {"do": "x"}}, 0.05) == {worker: None}
    assert peers.workers() == [worker]
    silent.close()
    assert peers.ask({worker: {"do": "x"}}, 5) == {worker: None}
    assert peers.workers() == []


@pytest.mark.parametrize(
    "greeting", [b"{}\n", b'{"token": "guess", "kind": "agent", "node": "n1"}\n', b"GET /\n\n", b"[1]\n"]
)
def test_a_stranger_without_the_token_is_disconnected(peers: Peers, greeting: bytes) -> None:
    with socket.create_connection(("127.0.0.1", peers.port)) as stranger:
        stranger.sendall(greeting)
        peers.wait(lambda: False, 0.2)
        stranger.settimeout(5)
        assert stranger.recv(1) == b""
    assert peers.all == []


def test_the_first_address_that_answers_is_used_and_none_is_an_error(peers: Peers) -> None:
    wire.connect(["127.0.0.2", "127.0.0.1"], peers.port, 20).close()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # not listening: it refuses, and no other program gets the port
        with pytest.raises(ConnectionError, match="cannot reach the coordinator"):
            wire.connect(["127.0.0.1"], closed.getsockname()[1], 0.1)
