"""Opening the store through which processes find each other, on either side.

torch's own way listens on all addresses, prints a stack trace for each attempt to connect, and waits for ever for a
program that takes the connection and says nothing.
"""

import threading
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from distmoe.parallel.network import listening_socket

_ANSWER_S = 5.0  # besides its own time limit, until a store that has been reached has answered


class NoStoreError(Exception):
    """What listens there is no store."""


def serve_store(address: str, port: int, limit_s: float, what: str) -> Any:
    """A store of this process that listens on one address.

    Args:
        address: Of this host.
        port: Of it; 0: any free one.
        limit_s: How long a request to it may take.
        what: Where they were given, for the message.

    Raises:
        UserError: The port is taken, or the address is another host's.
        NoStoreError: torch does not open it.
    """
    listener = listening_socket(address, port, what)
    port = listener.getsockname()[1]
    return _open(address, port, limit_s, is_master=True, master_listen_fd=listener.detach())


def reach_store(address: str, port: int, limit_s: float) -> Any:
    """The store of another process, where somebody listens.

    Args:
        address: Of its host.
        port: Of it.
        limit_s: How long a request to it, and the first one, may take.

    Raises:
        NoStoreError: Who listens there does not answer, or not as a store does.
    """
    return _open(address, port, limit_s, is_master=False)


def _open(address: str, port: int, limit_s: float, **options: Any) -> Any:
    opened: list[Any] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            opened.append(
                dist.TCPStore(  # type: ignore[attr-defined]
                    address,
                    port,
                    timeout=timedelta(seconds=limit_s),
                    wait_for_workers=False,
                    multi_tenant=True,
                    **options,
                )
            )
        except (RuntimeError, ValueError) as error:  # dist.DistError is a RuntimeError
            errors.append(error)

    # In a thread: the time limit of the constructor does not count for the first answer.
    thread = threading.Thread(target=run, name="open store", daemon=True)
    thread.start()
    thread.join(limit_s + _ANSWER_S)
    if not opened:
        raise NoStoreError(str(errors[0]).partition("\n")[0] if errors else "it does not answer")
    return opened[0]
