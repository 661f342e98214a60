"""The one place that imports FFCV: what the system uses of it, without what the import does to the process.

Importing FFCV sets torch to one thread, and spends 3 s on compiling a typed numba dictionary for two constants that
are only ever read from plain Python. Both are undone here, so import FFCV's names from this module.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numba.typed
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
    from ffcv.pipeline.operation import Operation
    from ffcv.reader import Reader
    from ffcv.transforms import ToTensor
    from ffcv.traversal_order.base import TraversalOrder
    from ffcv.writer import DatasetWriter

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
