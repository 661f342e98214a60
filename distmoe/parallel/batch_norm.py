"""Batch norm over all ranks: what one process computes from the whole micro-batch, on CPU and GPU.

Each norm gathers 2 C + 1 numbers in the forward pass (how many values a channel has, their mean, their summed squared
deviations) and sums 2 C in the backward pass. Rows may be spread unevenly, and a rank may have none.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from distmoe.moe.experts import Experts
from distmoe.parallel.collectives import Communicator, Communicators


def share_batch_statistics(module: nn.Module, communicators: Communicators) -> nn.Module:
    """Replaces every batch norm inside a module by a :class:`SharedBatchNorm` with the same parameters and buffers.

    Inside :class:`distmoe.moe.experts.Experts` statistics are shared with the other copies of the same experts,
    elsewhere with all ranks; where that is nobody, a norm stays as it is. Names in the state dict stay the same. Call
    it on every rank, before an optimizer, an engine or ``DistributedDataParallel`` takes the model over.

    Args:
        module: Changed in place. Its batch norms are ``BatchNorm1d``, ``2d``, ``3d`` and classes derived from them, of
            which a forward pass of their own and hooks are not kept.
        communicators: Of the mesh.

    Returns:
        The module; what replaces it where it is a batch norm itself.

    Example:
        >>> communicators = Communicators.of(Mesh(world_size, rank))
        >>> model = share_batch_statistics(torchvision.models.resnet18(), communicators)
    """
    in_experts = {inner for part in module.modules() if isinstance(part, Experts) for inner in part.modules()}
    shared: dict[nn.Module, SharedBatchNorm] = {}
    for name, norm in list(module.named_modules(remove_duplicate=False)):  # one norm may be in several places
        group = communicators.expert_replicas if norm in in_experts else communicators.world
        if group.size == 1 or not isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            continue
        if norm not in shared:
            shared[norm] = SharedBatchNorm(norm, group)
        if not name:
            return shared[norm]
        parent, _, attribute = name.rpartition(".")
        setattr(module.get_submodule(parent), attribute, shared[norm])
    return module


class SharedBatchNorm(_BatchNorm):
    """Batch norm whose statistics are those of the rows of a whole group of ranks.

    Outputs, gradients of the inputs and buffers equal those of torch's batch norm on all rows together; the gradients
    of weight and bias are of this rank's rows, to be averaged as those of any other parameter. Differs: fewer than two
    values a channel in the whole group do not raise; the running statistics, if there are any, stand in and stay as
    they are. Collective, forward and backward, wherever torch would take the statistics of the batch.

    Args:
        norm: Whose settings, parameters and buffers it takes over.
        group: The ranks. All of them call it equally often, on inputs that need a gradient on all of them or on none.

    Raises:
        ValueError: In the forward pass: an input that is not (B, C, ...) with the norm's C.
    """

    def __init__(self, norm: _BatchNorm, group: Communicator) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        self.weight, self.bias = norm.weight, norm.bias
        self.running_mean, self.running_var = norm.running_mean, norm.running_var
        self.num_batches_tracked = norm.num_batches_tracked
        self.train(norm.training)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) to the same shape and dtype."""
        self._check_input_dim(x)
        if not self.training and self.running_mean is not None:
            return super().forward(x)
        count, mean_C, variance_C = _group_statistics(x, self.group)
        pull = 1.0 / count.clamp(min=1.0)
        if self.running_mean is not None and self.running_var is not None:
            enough = count >= 2.0
            # Decided on the device: asking whether there are enough values would wait for it.
            pull = pull * enough
            kept_mean_C, kept_variance_C = self.running_mean.to(mean_C), self.running_var.to(variance_C)
            unbiased_C = variance_C * (count / (count - 1.0).clamp(min=1.0))
            self._follow(enough, mean_C, unbiased_C)
            mean_C = torch.where(enough, mean_C, kept_mean_C)
            variance_C = torch.where(enough, variance_C, kept_variance_C)
        dtype = torch.promote_types(x.dtype, torch.float32)
        normalized: Tensor = _Normalize.apply(
            x, self.weight, self.bias, mean_C.to(dtype), variance_C.to(dtype), pull.to(dtype), self.eps, self.group
        )
        return normalized

    @torch.no_grad()
    def _follow(self, enough: Tensor, mean_C: Tensor, variance_C: Tensor) -> None:
        """Moves the running statistics, if there were enough values."""
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += enough
        rate = 1.0 / self.num_batches_tracked.clamp(min=1).double() if self.momentum is None else self.momentum
        for running_C, now_C in ((self.running_mean, mean_C), (self.running_var, variance_C)):
            assert running_C is not None
            moved_C = (1.0 - rate) * running_C + rate * now_C
            running_C.copy_(torch.where(enough, moved_C.to(running_C), running_C))

    def _check_input_dim(self, x: Tensor) -> None:
        if x.dim() < 2 or x.shape[1] != self.num_features:
            raise ValueError(f"an input of shape {tuple(x.shape)} for a batch norm of {self.num_features} channels")


@torch.no_grad()
def _group_statistics(x: Tensor, group: Communicator) -> tuple[Tensor, Tensor, Tensor]:
    """Number of values, mean and biased variance of each channel over a group: (), (C,), (C,) in float64. Collective.

    The same bits on every rank; zeros where there is no value.

    Source: Chan, Golub and LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances".
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    num_values = x.numel() // x.shape[1]
    moments_2C = x.new_zeros((2, x.shape[1]), dtype=torch.float64)
    if num_values:
        mean_C, variance_C = torch.batch_norm_update_stats(x, None, None, 0.0)  # gives those of x, updates nothing
        moments_2C = torch.stack([mean_C, variance_C * num_values]).double()
    counts = moments_2C.new_full((1,), num_values)
    gathered = group.gather_equal(torch.cat([counts, moments_2C.flatten()]))
    counts_R1, means_RC, squares_RC = gathered.split([1, x.shape[1], x.shape[1]], dim=1)
    count = counts_R1.sum()
    mean_C = (counts_R1 * means_RC).sum(0) / count.clamp(min=1.0)
    squares_C = squares_RC.sum(0) + (counts_R1 * (means_RC - mean_C).square()).sum(0)
    return count, mean_C, squares_C / count.clamp(min=1.0)


class _Normalize(Function):
    """``(x - mean) / sqrt(variance + eps) * weight + bias``; its gradient knows that the moments depend on all rows.

    ``pull`` is one over the number of values that they are made of; 0 where they are not of the batch.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_C: Tensor | None,
        bias_C: Tensor | None,
        mean_C: Tensor,
        variance_C: Tensor,
        pull: Tensor,
        eps: float,
        group: Communicator,
    ) -> Tensor:
        ctx.save_for_backward(x, weight_C, mean_C, variance_C, pull)
        ctx.eps, ctx.group = eps, group
        weight_C, bias_C = (None if one is None else one.to(mean_C.dtype) for one in (weight_C, bias_C))
        return F.batch_norm(x, mean_C, variance_C, weight_C, bias_C, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_C, mean_C, variance_C, pull = ctx.saved_tensors
        wide, shape = mean_C.dtype, (1, -1, *(1,) * (x.dim() - 2))
        inverse_C = (variance_C + ctx.eps).rsqrt()
        scale_C = inverse_C if weight_C is None else inverse_C * weight_C
        axes = [axis for axis in range(x.dim()) if axis != 1]
        grad, centred = grad.to(wide), x.to(wide) - mean_C.view(shape)
        grad_weight_C, grad_bias_C = (grad * centred).sum(axes) * inverse_C, grad.sum(axes)
        grad_x = None
        if ctx.needs_input_grad[0]:
            through_weight_C, through_bias_C = ctx.group.sum_(torch.stack([grad_weight_C, grad_bias_C])) * pull
            grad = grad - centred * (inverse_C * through_weight_C).view(shape) - through_bias_C.view(shape)
            grad_x = (grad * scale_C.view(shape)).to(x.dtype)
        of_parameters = (None, None) if weight_C is None else (grad_weight_C.to(weight_C), grad_bias_C.to(weight_C))
        return grad_x, *of_parameters, None, None, None, None, None
