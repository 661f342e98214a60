"""The two-layer MLPs of several experts on rows grouped by expert, and which way of multiplying is fastest.

Two products: ``loop``, one matrix product an expert, and ``grouped``, torch's ``grouped_mm`` for all experts. Their
results are equal to rounding.

Letters: R rows, L local experts, D width, H hidden width.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

Activation = Literal["relu", "gelu"]
Product = Literal["loop", "grouped"]

_aten = torch.ops.aten
_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}
_ACTIVATE_INTO: dict[Activation, Callable[..., Tensor]] = {"relu": _aten.relu.out, "gelu": _aten.gelu.out}
_MULTIPLY_BY_SLOPE: dict[Activation, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda grad, before: _aten.threshold_backward.grad_input(grad, before, 0, grad_input=grad),
    "gelu": lambda grad, before: _aten.gelu_backward.grad_input(grad, before, grad_input=grad),
}
_ALIGNMENT = 16  # bytes: rows of a matrix that grouped_mm takes are multiples of it
_TIMED_ROWS = 256  # an expert


class Weights(NamedTuple):
    """Of L experts, stacked: ``y = act(x w1_e + b1_e) w2_e + b2_e``."""

    w1_LDH: Tensor
    b1_LH: Tensor
    w2_LHD: Tensor
    b2_LD: Tensor


def loop_mlp(
    rows_RD: Tensor, counts_L: Sequence[int], weights: Weights, activation: Activation, with_hidden: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """One matrix product an expert.

    Only the hidden layer before its activation is kept for the backward pass, which activates it again. Gradients of
    each expert are written straight into the gradient of the stack: from plain operations they would have to be copied
    there.

    Args:
        rows_RD: The rows of expert 0, then of expert 1, ...; of the weights' dtype.
        counts_L: Rows of each expert.
        weights: Of the experts.
        activation: Between the two layers.
        with_hidden: Give the hidden layers before their activation, too.

    Returns:
        Outputs (R, D), or they and the hidden layers (R, H).

    Raises:
        ValueError: Counts of other experts, or that do not add up to R.
    """
    _check(rows_RD, counts_L, weights)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (rows_RD, *weights)):
        out_RD, before_RH = _LoopMLP.apply(rows_RD, *weights, tuple(counts_L), activation)
    else:
        out_RD, before_RH = _forward(rows_RD, counts_L, weights, activation, keep=with_hidden)
    return (out_RD, before_RH) if with_hidden else out_RD


def grouped_mlp(
    rows_RD: Tensor, counts_L: Sequence[int], weights: Weights, activation: Activation, with_hidden: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """As :func:`loop_mlp`, with one ``grouped_mm`` a layer for all experts.

    Raises:
        ValueError: As there; a width or a type that ``grouped_mm`` does not take.
    """
    _check(rows_RD, counts_L, weights)
    if not _can_group(weights.w1_LDH):
        width, hidden = weights.w1_LDH.shape[1:]
        raise ValueError(
            f"grouped_mm takes float32, bfloat16 and float16 and rows of a multiple of {_ALIGNMENT} bytes, not widths "
            f"{width} and {hidden} in {rows_RD.dtype}: use the product loop"
        )
    if not len(rows_RD):  # not every kernel takes none
        return loop_mlp(rows_RD, counts_L, weights, activation, with_hidden)
    device = rows_RD.device
    idle = torch.tensor([expert for expert, count in enumerate(counts_L) if count == 0], dtype=torch.long).to(device)
    counts = torch.tensor(counts_L).to(device)
    expert_ids_R = torch.arange(len(counts), device=device).repeat_interleave(counts, output_size=len(rows_RD))
    ends_L = counts.cumsum(0).to(torch.int32)
    w1_LDH, w2_LHD = (_with_zero_gradient(weight, idle) for weight in (weights.w1_LDH, weights.w2_LHD))
    before_RH = F.grouped_mm(rows_RD, w1_LDH, offs=ends_L) + weights.b1_LH.index_select(0, expert_ids_R)
    after_RH = _ACTIVATIONS[activation](before_RH)
    out_RD = F.grouped_mm(after_RH, w2_LHD, offs=ends_L) + weights.b2_LD.index_select(0, expert_ids_R)
    for result in (out_RD, before_RH):
        if result.requires_grad:
            result.register_hook(Tensor.contiguous)  # grouped_mm refuses gradients that are not
    return (out_RD, before_RH) if with_hidden else out_RD


def _with_zero_gradient(weight: Tensor, idle: Tensor) -> Tensor:
    """The same weight, its gradient set to zero for experts without rows: some kernels leave something else there.

    See https://github.com/pytorch/pytorch/issues/172439.
    """
    if not len(idle) or not weight.requires_grad:
        return weight
    through = weight.view_as(weight)
    through.register_hook(lambda grad: grad.index_fill(0, idle, 0.0))
    return through


PRODUCTS: dict[Product, Callable[..., Tensor | tuple[Tensor, Tensor]]] = {"loop": loop_mlp, "grouped": grouped_mlp}


def fastest_product(w1_LDH: Tensor) -> Product:
    """The product for weights of this shape, dtype and device.

    On a CPU it is always ``loop``, which measured as fast or faster in float32 and in bfloat16: a choice by the clock
    would let two runs of one configuration differ. On a GPU both are timed, once in a process.
    """
    if w1_LDH.device.type != "cuda" or not _can_group(w1_LDH):
        return "loop"
    return _timed(torch.cuda.get_device_name(w1_LDH.device), w1_LDH.device, w1_LDH.dtype, *w1_LDH.shape)


def fastest(
    candidates: Mapping[Product, Callable[[], None]], seconds: Callable[[Callable[[], None]], float]
) -> Product:
    """The name of the candidate that takes the fewest seconds; the first among equals."""
    return min(candidates, key=lambda name: seconds(candidates[name]))


def _can_group(w1_LDH: Tensor) -> bool:
    aligned = all(size * w1_LDH.element_size() % _ALIGNMENT == 0 for size in w1_LDH.shape[1:])
    return aligned and w1_LDH.dtype in (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _timed(
    device_name: str, device: torch.device, dtype: torch.dtype, num_local: int, width: int, hidden: int
) -> Product:
    """Forward and backward pass on equal rows; the device's name is a part of what is remembered."""
    del device_name
    # The first call may come from a forward pass under inference mode, and its generator must stay as it is.
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        return _time_products(device, dtype, num_local, width, hidden)


def _time_products(device: torch.device, dtype: torch.dtype, num_local: int, width: int, hidden: int) -> Product:
    generator = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=dtype, generator=generator).requires_grad_()

    shapes = [(num_local, width, hidden), (num_local, hidden), (num_local, hidden, width), (num_local, width)]
    weights, rows_RD = Weights(*(drawn(*shape) for shape in shapes)), drawn(num_local * _TIMED_ROWS, width)

    def run(product: Product) -> None:
        out_RD = PRODUCTS[product](rows_RD, [_TIMED_ROWS] * num_local, weights, "relu")
        assert isinstance(out_RD, Tensor), "no hidden states were asked for"
        torch.autograd.grad(out_RD, (rows_RD, *weights), torch.ones_like(out_RD))

    return fastest({product: functools.partial(run, product) for product in PRODUCTS}, _cuda_seconds)


def _cuda_seconds(run: Callable[[], None], repeats: int = 5) -> float:
    seconds = []
    for _ in range(repeats + 1):  # the first one warms up and, slowest of all, is not the median's neighbour
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[repeats // 2]


def _check(rows_RD: Tensor, counts_L: Sequence[int], weights: Weights) -> None:
    num_local = len(weights.w1_LDH)
    if len(counts_L) != num_local or sum(counts_L) != len(rows_RD):
        raise ValueError(
            f"counts of {len(counts_L)} experts with {sum(counts_L)} rows, but there are {num_local} experts and "
            f"{len(rows_RD)} rows"
        )


class _Span(NamedTuple):
    """The rows of an expert. Matrix products read and write up to ``padded_end``, beyond the expert's ``end``."""

    start: int
    end: int
    padded_end: int


def _spans(rows_RD: Tensor, counts_L: Sequence[int]) -> list[_Span]:
    """On a CPU, products in half precision are compiled for each new number of rows, which costs more than the product.

    An expert's rows differ from step to step, so there their number is rounded up to one of 8 between powers of two.
    What lies beyond an expert's rows belongs to the next one, which comes later and overwrites what this one wrote.
    """
    rounded = rows_RD.device.type == "cpu" and rows_RD.dtype in (torch.bfloat16, torch.float16)
    spans, start = [], 0
    for count in counts_L:
        step = max(32, 1 << max(count.bit_length() - 4, 0)) if rounded else 1
        spans.append(_Span(start, start + count, start + -(-count // step) * step))
        start += count
    return spans


def _with_room(x_R: Tensor, spans: list[_Span]) -> Tensor:
    """Rows and, behind them, as many zeros as the padded products of the last experts need."""
    room = max(span.padded_end for span in spans) - len(x_R)
    return F.pad(x_R, (0, 0, 0, room)) if room > 0 else x_R


def _scratch(x_R: Tensor, spans: list[_Span], width: int) -> Tensor:
    """Room for one expert's hidden layer: small enough to stay in the cache."""
    return x_R.new_empty(max(span.padded_end - span.start for span in spans), width)


def _forward(
    rows_RD: Tensor, counts_L: Sequence[int], weights: Weights, activation: Activation, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Outputs and, to ``keep``, the hidden layers before their activation."""
    spans = _spans(rows_RD, counts_L)
    padded_RD = _with_room(rows_RD, spans)
    out_RD = rows_RD.new_empty(padded_RD.shape)
    after_NH = _scratch(rows_RD, spans, weights.b1_LH.shape[1])
    before_RH = rows_RD.new_empty(len(padded_RD), after_NH.shape[1]) if keep else None
    for (start, _, padded_end), w1, b1, w2, b2 in zip(spans, *(weight.unbind() for weight in weights), strict=True):
        after = after_NH[: padded_end - start]
        before = after if before_RH is None else before_RH[start:padded_end]
        torch.addmm(b1, padded_RD[start:padded_end], w1, out=before)
        _ACTIVATE_INTO[activation](before, out=after)
        torch.addmm(b2, after, w2, out=out_RD[start:padded_end])
    # Cut in place: a slice would be a view, and autograd forbids changing views that come from one of its functions.
    out_RD.resize_(rows_RD.shape)
    if before_RH is not None:
        before_RH.resize_(len(rows_RD), before_RH.shape[1])
    return out_RD, before_RH


class _LoopMLP(Function):
    """:func:`loop_mlp` with its gradients written out."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_RD: Tensor,
        w1_LDH: Tensor,
        b1_LH: Tensor,
        w2_LHD: Tensor,
        b2_LD: Tensor,
        counts_L: tuple[int, ...],
        activation: Activation,
    ) -> tuple[Tensor, Tensor | None]:
        weights = Weights(w1_LDH, b1_LH, w2_LHD, b2_LD)
        out_RD, before_RH = _forward(rows_RD, counts_L, weights, activation, keep=True)
        ctx.save_for_backward(rows_RD, *weights, before_RH)
        ctx.counts_L, ctx.activation = counts_L, activation
        ctx.set_materialize_grads(False)
        return out_RD, before_RH

    @staticmethod
    def backward(ctx: Any, grad_out_RD: Tensor | None, grad_before_RH: Tensor | None) -> tuple[Tensor | None, ...]:
        rows_RD, *stacks, before_RH = ctx.saved_tensors
        weights = Weights(*stacks)
        if grad_out_RD is None:
            grad_out_RD = torch.zeros_like(rows_RD)
        if torch.is_grad_enabled():  # somebody differentiates twice
            grads = _differentiable_gradients(ctx, rows_RD, weights, grad_out_RD, grad_before_RH)
            return *grads, None, None
        spans = _spans(rows_RD, ctx.counts_L)
        padded_RD, grad_out_RD = _with_room(rows_RD, spans), _with_room(grad_out_RD.contiguous(), spans)
        rows_wanted, weights_wanted = ctx.needs_input_grad[0], any(ctx.needs_input_grad[1:5])
        grad_rows_RD = rows_RD.new_empty(padded_RD.shape)
        grads_L = Weights(*(torch.empty_like(weight) for weight in weights)) if weights_wanted else (None,) * 4
        after_NH, grad_NH = (_scratch(rows_RD, spans, before_RH.shape[1]) for _ in range(2))
        for expert, (start, end, padded_end) in enumerate(spans):
            count, padded = end - start, padded_end - start
            before, after, grad = before_RH[start:end], after_NH[:padded], grad_NH[:padded]
            out, rows = grad_out_RD[start:padded_end], padded_RD[start:padded_end]
            if padded > count:  # rows of the next expert add nothing, be they infinite
                after[count:].zero_()
                out, rows = _zeros_from(out, count), _zeros_from(rows, count)
            torch.mm(out, weights.w2_LHD[expert].T, out=grad)
            _MULTIPLY_BY_SLOPE[ctx.activation](grad[:count], before)
            if grad_before_RH is not None:
                grad[:count] += grad_before_RH[start:end]
            if rows_wanted:
                torch.mm(grad, weights.w1_LDH[expert].T, out=grad_rows_RD[start:padded_end])
            if isinstance(grads_L, Weights):
                _ACTIVATE_INTO[ctx.activation](before, out=after[:count])
                torch.mm(after.T, out, out=grads_L.w2_LHD[expert])
                torch.sum(out, 0, out=grads_L.b2_LD[expert])
                torch.mm(rows.T, grad, out=grads_L.w1_LDH[expert])
                torch.sum(grad, 0, out=grads_L.b1_LH[expert])
        return grad_rows_RD.resize_(rows_RD.shape) if rows_wanted else None, *grads_L, None, None


def _zeros_from(x_R: Tensor, count: int) -> Tensor:
    """A copy with zeros behind the first ``count`` rows."""
    return F.pad(x_R[:count], (0, 0, 0, len(x_R) - count))


def _differentiable_gradients(
    ctx: Any, rows_RD: Tensor, weights: Weights, grad_out_RD: Tensor, grad_before_RH: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The same gradients from plain operations, for gradients of gradients."""
    inputs = (rows_RD, *weights)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    outputs, befores = [], []
    pieces = zip(rows_RD.split(ctx.counts_L), *(weight.unbind() for weight in weights), strict=True)
    for x, w1, b1, w2, b2 in pieces:
        befores.append(torch.addmm(b1, x, w1))
        outputs.append(torch.addmm(b2, _ACTIVATIONS[ctx.activation](befores[-1]), w2))
    ends, grads = [torch.cat(outputs)], [grad_out_RD]
    if grad_before_RH is not None:
        ends, grads = [*ends, torch.cat(befores)], [*grads, grad_before_RH]
    found = iter(torch.autograd.grad(ends, wanted, grads, create_graph=True))
    return tuple(next(found) if tensor.requires_grad else None for tensor in inputs)
