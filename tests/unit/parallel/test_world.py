"""The store of a world, and the device of a rank."""

import re
import socket
from collections.abc import Iterator

import pytest
import torch

from distmoe.contracts import UserError
from distmoe.parallel.runtime import choose_device
from distmoe.parallel.world import World


def test_store_listens_on_the_address_of_the_master_only():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = World(0, 2, 0, 2, master=("127.0.0.2", port)).open_store(limit_s=5.0)
    server.set("key", "value")
    assert World(1, 2, 1, 2, master=("127.0.0.2", port)).open_store(limit_s=5.0).get("key") == b"value"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that another program listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


# Rank, processes on a host, address, port (0: the taken one), and what is said.
NO_STORE = {
    "nobody serves": (3, 4, "127.0.0.1", 1, "rank 3: nobody answers at MASTER_ADDR (127.0.0.1), MASTER_PORT (1) for"),
    "unknown name": (3, 4, "no.such.host.invalid", 1, "does not know the name in MASTER_ADDR (no.such.host.invalid: "),
    "unknown name of its own": (0, 4, "no.such.host.invalid", 1, "MASTER_ADDR (no.such.host.invalid): host"),
    "taken port": (0, 4, "127.0.0.1", 0, "the port is taken by another program: choose a free one"),
    "another program that says nothing": (
        3,
        4,
        "127.0.0.1",
        0,
        "cannot be opened (it does not answer): another program",
    ),
    "another host's address": (0, 4, "192.0.2.1", 29500, "192.0.2.1 is not an address of host"),
    "loopback address for others": (0, 2, "localhost", 29500, "MASTER_ADDR (localhost) is a loopback address on host"),
}


@pytest.mark.parametrize("case", NO_STORE)
def test_store_that_cannot_be_opened(case: str, taken: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("distmoe.parallel.store._ANSWER_S", 0.2)
    rank, ranks_per_host, address, port, message = NO_STORE[case]
    world = World(rank, 4, rank % ranks_per_host, ranks_per_host, master=(address, port or taken))
    with pytest.raises(UserError, match=re.escape(message)):
        world.open_store(limit_s=0.2)


@pytest.mark.parametrize(
    ("visible", "num_gpus", "device"),
    [
        (None, 2, "cuda:1"),
        ("4,5", 2, "cuda:1"),
        ("5", 1, "cuda:0"),  # each process sees its own
        ("", 0, "cpu"),
        (None, 1, "2 processes on this host, but 1 GPUs"),
        ("4,5,6", 3, "cuda:1"),
    ],
)
def test_device_of_a_rank(visible: str | None, num_gpus: int, device: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    try:
        found = str(choose_device(World(rank=3, size=4, local_rank=1, ranks_per_host=2)))
    except UserError as error:
        found = str(error).partition(":")[0]
    assert found == device
