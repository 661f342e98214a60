"""What two threads must not change."""

from collections.abc import Callable, Sequence

import torch


def assert_equal_bits_on_two_threads(once: Callable[[], Sequence[torch.Tensor]], repeats: int = 3) -> None:
    """Runs it several times on two threads; every tensor is the same, bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        first = once()
        for _ in range(repeats):
            assert all(torch.equal(one, other) for one, other in zip(first, once(), strict=True))
    finally:
        torch.set_num_threads(threads)
