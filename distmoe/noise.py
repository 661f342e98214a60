"""Counter-based random numbers: every draw is a hash of what it is for, so there is no generator state to save.

A *key* is one 64-bit integer made from the seed, the step and the name of the consumer (:func:`make_key`). A draw adds
integer *counters* (sample id, position) and returns one number for each element of their broadcast shape. The same
key and counters give the same bits in every layout and in every batch a sample happens to be in, and on every device
(but for :func:`normal`, whose logarithm and cosine may differ in the last bit).

The hash is the finaliser of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"),
chained over key and counters. torch has no unsigned 64-bit arithmetic; int64 wraps around alike, and a logical
right shift is an arithmetic one with the copied sign bits masked away.
"""

import hashlib
import math

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # the increment of SplitMix64, as a signed integer
_MULTIPLIERS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))
_UNIT = 2.0**-24  # float32 holds 24 bits exactly: a uniform number is a multiple of this and never 1


def make_key(*parts: int | str) -> int:
    """A signed 64-bit key from integers and names, e.g. ``make_key(seed, step, "blocks.1.gate")``."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def random_bits(key: int, *counters: Tensor) -> Tensor:
    """Uniform 64-bit integers (int64), one for each element of the broadcast shape of ``counters`` (int64 tensors)."""
    if not counters:
        raise ValueError("random_bits needs at least one counter")
    state = _mix(counters[0] * _GOLDEN + key)
    for counter in counters[1:]:
        state = _mix((state ^ (counter * _GOLDEN)) + _GOLDEN)
    return state


def uniform(key: int, *counters: Tensor) -> Tensor:
    """float32 in [0, 1), multiples of 2^-24."""
    return _shift_right(random_bits(key, *counters), 40).to(torch.float32) * _UNIT


def integers(key: int, high: int, *counters: Tensor) -> Tensor:
    """int64 in [0, high); the bias against some values is below high / 2^32."""
    return (_shift_right(random_bits(key, *counters), 32) * high) >> 32


def normal(key: int, *counters: Tensor) -> Tensor:
    """float32 from the standard normal distribution (Box-Muller on two halves of one hash)."""
    bits = random_bits(key, *counters)
    radius = torch.sqrt(-2.0 * torch.log1p(-_shift_right(bits, 40).to(torch.float32) * _UNIT))
    angle = ((bits >> 16) & 0xFFFFFF).to(torch.float32) * (_UNIT * 2.0 * math.pi)
    return radius * torch.cos(angle)


def permutation(key: int, size: int) -> Tensor:
    """A random permutation of ``range(size)`` (int64): the order of the hashes, ties by position."""
    return torch.argsort(random_bits(key, torch.arange(size)), stable=True)


def _shift_right(value: Tensor, bits: int) -> Tensor:
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(state: Tensor) -> Tensor:
    state = (state ^ _shift_right(state, 30)) * _MULTIPLIERS[0]
    state = (state ^ _shift_right(state, 27)) * _MULTIPLIERS[1]
    return state ^ _shift_right(state, 31)
