"""Batch norm over the images of all processes instead of each one's own."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from medattn.training.distributed import summed


class SyncedBatchNorm(_BatchNorm):
    """Any of torch's batch norms with the statistics of all processes while it trains; [B, C, *size], B >= 1.

    torch's own SyncBatchNorm refuses tensors of a CPU, on which what a cluster will do can be tested. All
    processes must hold inputs of one size. Evaluation, and training alone, is torch's batch norm.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x normalised per channel, in its own type; statistics are float32 at least."""
        if not self.training or not dist.is_initialized():
            return super().forward(x)
        world = dist.get_world_size()
        axes = [axis for axis in range(x.ndim) if axis != 1]
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        mean = summed(wide.mean(axes)) / world
        shape = [1, -1, *[1] * (x.ndim - 2)]
        centred = wide - mean.view(shape)  # before squaring: a mean far from zero would cost all digits
        variance = summed(centred.square().mean(axes)) / world
        self._track(mean, variance, world * x.numel() // x.shape[1])
        scale = (variance + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight
        out = centred * scale.view(shape)
        if self.bias is not None:
            out = out + self.bias.view(shape)
        return out.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, count: int) -> None:
        """Move the running statistics; their variance is the unbiased one."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        rate = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), rate)
        self.running_var.lerp_((variance * (count / max(1, count - 1))).to(self.running_var), rate)

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002 - torch's name
        if input.ndim < 2:
            raise ValueError(f"expected [B, C, *size], got {list(input.shape)}")


def synchronise_batch_norms(network: nn.Module) -> None:
    """Replace every batch norm inside the network, in place; parameters, buffers and names stay."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, _BatchNorm) and not isinstance(child, SyncedBatchNorm):
                setattr(module, name, _synced(child))


def _synced(norm: _BatchNorm) -> SyncedBatchNorm:
    made = SyncedBatchNorm(
        norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
    ).train(norm.training)
    made._parameters, made._buffers = norm._parameters, norm._buffers
    return made
