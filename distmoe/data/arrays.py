"""The user's own data: one ``.npz`` file with inputs, labels and factor columns; docs/data.md describes its layout.

Nothing is unpickled. Every malformed file ends in a :class:`distmoe.contracts.UserError` that names file, key, what was
found and what is allowed.
"""

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from distmoe.config import DataSection
from distmoe.contracts import SplitName, UserError
from distmoe.data.split import Array, Split
from distmoe.noise import make_key, permutation

TEST_SHARE = 10  # one sample in so many is a test sample where the file has no test split of its own
_TEST = "test_"
_RESERVED = ("inputs", "labels")


def load(data: DataSection, split: SplitName) -> Split:
    """Reads one split of the file ``data.path``.

    Without ``test_inputs`` and ``test_labels`` a tenth of the samples, drawn by a fixed hash of their number, is the
    test split: the same samples for every seed, and not simply the file's tail, which is often sorted.

    Raises:
        UserError: The file is missing, damaged or malformed.
    """
    path = Path(data.path or "")
    arrays = _read(path)
    for key in _RESERVED:
        if key not in arrays:
            _fail(
                path, key, f"missing (the file holds: {', '.join(sorted(arrays)) or 'nothing'})", "an array is needed"
            )
    has_test = _check_test_keys(path, arrays)
    train = _check(path, arrays, prefix="")
    num_classes = _check_classes(path, train.labels)
    names = tuple(str(label) for label in range(num_classes))
    if has_test:
        test = _check(path, arrays, prefix=_TEST)
        _check_pair(path, train, test, num_classes)
        chosen = train if split == "train" else test
        return Split(chosen.inputs, chosen.labels, chosen.factors, names)
    rows = _held_out_rows(path, len(train.labels), split)
    factors = {name: values[rows] for name, values in train.factors.items()}
    return Split(train.inputs[rows], train.labels[rows], factors, names)


def _fail(path: Path, key: str, found: str, allowed: str) -> None:
    raise UserError(f"data.path {path}: {key}: {found}; {allowed}; docs/data.md describes the file")


def _read(path: Path) -> dict[str, Array]:
    """All arrays of the file."""
    hint = "data.path must name a .npz file as numpy.savez writes it"
    try:
        if not path.is_file():
            raise UserError(f"data.path {path}: {'not a file' if path.exists() else 'does not exist'}; {hint}")
        with path.open("rb") as file:
            stored = np.load(file, allow_pickle=False)
            if not isinstance(stored, np.lib.npyio.NpzFile):
                raise UserError(f"data.path {path}: holds a single array (.npy); {hint}, with keys inputs and labels")
            with stored:
                return {key: _read_key(path, stored, key) for key in stored.files}
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"data.path {path}: too large for this machine's memory") from None
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"data.path {path}: not a readable .npz file ({error}); {hint}") from None


def _read_key(path: Path, stored: "np.lib.npyio.NpzFile", key: str) -> Array:
    try:
        value: Array = stored[key]
    except (OSError, ValueError, EOFError, TypeError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        reason = "Python objects, which would have to be unpickled" if "pickle" in str(error) else f"damaged ({error})"
        raise UserError(f"data.path {path}: {key}: {reason}; only plain numeric arrays are read") from None
    if not isinstance(value, np.ndarray):
        raise UserError(f"data.path {path}: {key}: not an array; only plain numeric arrays are read")
    return value


def _check_test_keys(path: Path, arrays: dict[str, Array]) -> bool:
    """Whether the file has a test split of its own; half a one is an error."""
    factors = {key for key in arrays if key not in _RESERVED and not key.startswith(_TEST)}
    of_test = {key.removeprefix(_TEST) for key in arrays if key.startswith(_TEST)}
    if not of_test:
        return False
    wanted = factors | set(_RESERVED)
    for name in sorted(wanted - of_test):
        _fail(path, _TEST + name, "missing", "a file with a test split needs test_inputs, test_labels and each factor")
    for name in sorted(of_test - wanted):
        _fail(path, _TEST + name, f"there is no {name} beside it", "training and test split need the same factors")
    return True


def _check(path: Path, arrays: dict[str, Array], prefix: str) -> Split:
    """The arrays of one split, checked and in their final types."""
    inputs = _check_inputs(path, prefix + "inputs", arrays[prefix + "inputs"])
    labels = _check_labels(path, prefix + "labels", arrays[prefix + "labels"], len(inputs))
    names = [key for key in arrays if key not in _RESERVED and not key.startswith(_TEST)]
    factors = {name: _check_factor(path, prefix + name, arrays[prefix + name], len(inputs)) for name in names}
    return Split(inputs, labels, factors)


def _check_inputs(path: Path, key: str, inputs: Array) -> Array:
    if inputs.dtype not in (np.uint8, np.float32):
        _fail(path, key, f"type {inputs.dtype}", "allowed are uint8 and float32")
    if inputs.ndim < 2 or inputs.size == 0:
        _fail(path, key, f"shape {inputs.shape}", "must be (samples, ...) with at least one sample and one value each")
    if inputs.ndim > 8:
        _fail(path, key, f"{inputs.ndim} dimensions", "at most 8 are allowed")
    if inputs.dtype == np.float32 and not np.isfinite(inputs).all():
        row = int(np.argmin(np.isfinite(inputs).reshape(len(inputs), -1).all(axis=1)))
        _fail(path, key, f"NaN or infinity in sample {row}", "all values must be finite")
    return np.ascontiguousarray(inputs.astype(inputs.dtype.newbyteorder("=")))


def _check_labels(path: Path, key: str, labels: Array, num_samples: int) -> Array:
    if labels.dtype.kind not in "iu":
        _fail(path, key, f"type {labels.dtype}", "must be integers")
    if labels.shape != (num_samples,):
        _fail(path, key, f"shape {labels.shape}", f"must be ({num_samples},), one label for each of the inputs")
    if labels.min() < 0:
        _fail(path, key, f"{labels.min()} at sample {int(labels.argmin())}", "labels count from 0")
    if labels.max() > np.iinfo(np.int32).max:
        _fail(path, key, f"{labels.max()}", "labels are class numbers from 0")
    return labels.astype(np.int64)


def _check_factor(path: Path, key: str, values: Array, num_samples: int) -> Array:
    if values.dtype.kind not in "iufb":
        _fail(path, key, f"type {values.dtype}", "a factor holds numbers")
    if values.ndim not in (1, 2) or len(values) != num_samples or values.size == 0:
        _fail(path, key, f"shape {values.shape}", f"a factor must be ({num_samples},) or ({num_samples}, values)")
    with np.errstate(over="ignore"):
        columns = np.ascontiguousarray(values.reshape(num_samples, -1).astype(np.float32))
    if not np.isfinite(columns).all():
        row = int(np.argmin(np.isfinite(columns).all(axis=1)))
        _fail(path, key, f"NaN, infinity or beyond float32 in sample {row}", "all values must be finite")
    return columns


def _check_classes(path: Path, labels: Array) -> int:
    """The number of classes; each must occur, which catches labels that count from 1."""
    num_classes = int(labels.max()) + 1
    present = np.unique(labels)
    if num_classes < 2:
        _fail(path, "labels", "only class 0", "at least two classes are needed")
    if len(present) < num_classes:
        gaps = np.flatnonzero(present != np.arange(len(present)))
        missing = int(gaps[0])
        _fail(path, "labels", f"no sample of class {missing}", f"each class of 0..{num_classes - 1} must occur")
    return num_classes


def _check_pair(path: Path, train: Split, test: Split, num_classes: int) -> None:
    if test.inputs.shape[1:] != train.inputs.shape[1:] or test.inputs.dtype != train.inputs.dtype:
        found = f"samples {test.inputs.shape[1:]} {test.inputs.dtype}"
        _fail(path, "test_inputs", found, f"must be {train.inputs.shape[1:]} {train.inputs.dtype}, as inputs")
    if test.labels.max() >= num_classes:
        _fail(path, "test_labels", f"class {test.labels.max()}", f"labels holds only 0..{num_classes - 1}")
    for name, values in train.factors.items():
        if test.factors[name].shape[1] != values.shape[1]:
            found = f"{test.factors[name].shape[1]} values a sample"
            _fail(path, _TEST + name, found, f"must have {values.shape[1]}, as {name}")


def _held_out_rows(path: Path, num_samples: int, split: SplitName) -> Array:
    num_test = num_samples // TEST_SHARE
    if num_test == 0:
        allowed = f"at least {TEST_SHARE} are needed to hold a tenth of them out, or give test_inputs and test_labels"
        _fail(path, "inputs", f"{num_samples} samples", allowed)
    order = permutation(make_key("arrays", "test split"), num_samples)
    rows = order[-num_test:] if split == "test" else order[:-num_test]
    return torch.sort(rows).values.numpy()
