"""The one place that imports FFCV first: what the system uses of it, without what it does to the process.

* Importing FFCV sets torch to one thread.
* It spends 3 s on compiling a typed numba dictionary for two constants that are only ever read from plain Python.
* Each loader changes the type that numba shares between all users of one-dimensional uint8 arrays, so that code
  compiled before is no longer found under its own types (KeyError when it is freed).

All three are mended here, so import FFCV's names from this module.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numba.typed
import numba.types
import torch


@contextmanager
def keep_torch_threads() -> Iterator[None]:
    """Puts torch's thread count back: FFCV sets it on import and in the constructor of its ``Loader``."""
    num_threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@contextmanager
def _plain_dicts() -> Iterator[None]:
    typed = numba.typed.Dict
    numba.typed.Dict = dict
    try:
        yield
    finally:
        numba.typed.Dict = typed


with keep_torch_threads(), _plain_dicts():
    from ffcv.fields import IntField, NDArrayField, RGBImageField
    from ffcv.fields.decoders import IntDecoder, NDArrayDecoder, SimpleRGBImageDecoder
    from ffcv.loader import Loader
    from ffcv.loader.epoch_iterator import EpochIterator
    from ffcv.memory_managers.os_cache import OSCacheManager
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.operation import Operation
    from ffcv.reader import Reader
    from ffcv.transforms import ToTensor
    from ffcv.traversal_order.base import TraversalOrder
    from ffcv.writer import DatasetWriter


def _compile_reader(_: Any) -> Any:
    """FFCV's function from an address to the bytes stored there, with its own types and a quicker search.

    FFCV's takes half a second to compile, nearly all of it for ``numpy.searchsorted``.
    """
    mapping = numba.types.Array(numba.types.uint8, 1, "C", readonly=True)
    table = numba.types.Array(numba.types.uint64, 1, "C")
    state_type = numba.types.Tuple([mapping, table, table])  # type: ignore[no-untyped-call]

    def read(address: Any, state: Any) -> Any:
        contents, addresses, sizes = state
        low, high = 0, len(addresses) - 1  # addresses ascend, and the wanted one is among them
        while low < high:
            middle = (low + high) // 2
            if addresses[middle] < address:
                low = middle + 1
            else:
                high = middle
        return contents[address : address + sizes[low]]

    return Compiler.compile(read, mapping(numba.types.uint64, state_type))


OSCacheManager.compile_reader = _compile_reader

__all__ = [
    "DatasetWriter",
    "EpochIterator",
    "IntDecoder",
    "IntField",
    "Loader",
    "NDArrayDecoder",
    "NDArrayField",
    "Operation",
    "RGBImageField",
    "Reader",
    "SimpleRGBImageDecoder",
    "ToTensor",
    "TraversalOrder",
    "keep_torch_threads",
]
