"""One Newton step of several processes, each of which has a part of the batch.

Process i has n_i of the N samples, and the mean loss over these samples. The gradient of the whole
batch is the mean of the processes' gradients, weighted by n_i / N; so are the curvature products.
`whole_batch` puts these means on the parameters of each process, between the backward pass and the
optimizer's `step()`. The optimizer itself knows nothing of other processes.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, distributed

from cgn_tutorial.cgn import Block, CGNOptimizer

__all__ = ["Share", "whole_batch"]

CHUNK = 1 << 20  # how many numbers a fingerprint reads at a time, which bounds its memory


def whole_batch(optimizer: CGNOptimizer, batch_size: int, group: Any = None) -> Share:
    """Replace the gradients and curvature products of this process by those of the whole batch.

    Call this function after the backward pass, and before `optimizer.step()`. If you pass a closure
    to `step()`, call this function in the closure::

        loss.backward()                                   # or curvature.backward(loss, outputs)
        share = whole_batch(optimizer, len(inputs))
        optimizer.step()

    One all-reduce averages each product when the solve asks for the product. One all-reduce a step
    averages the gradients, unless all processes have the same gradients to the last bit, as
    DistributedDataParallel leaves them. Each process computes all else for itself. To keep the same
    parameters, the processes need the same hardware and the same number of threads. One all-gather
    a step checks that blocks, options and parameters agree.

    Args:
        optimizer: The optimizer of this process.
        batch_size: The number of samples in the loss of this process.
        group: The processes that share the batch; `None` means all.

    Returns:
        The share of this process in the batch; `share.loss` averages a loss over all processes.

    Raises:
        TypeError: `group` is not a group that this process belongs to.
        ValueError: `batch_size` is not a positive integer; or the processes differ in `batch_size`,
            but their gradients are averages without weights already.
        RuntimeError: A product is missing, or is an average already; or the blocks, options or
            parameters of the processes differ. If one process raises an error, all processes raise
            an error, and nothing has been changed.
        ConnectionError: Another process does not answer within the timeout of the group, or has
            died. No parameter has been changed.
    """
    if group is None:
        group = distributed.group.WORLD
    if not isinstance(group, distributed.ProcessGroup):
        raise TypeError(
            "group must be a group that this process belongs to, or None for all processes, once "
            f"torch.distributed.init_process_group has run, but is {group!r}."
        )
    device = optimizer.param_groups[0]["params"][0].device
    mine = torch.zeros(4, dtype=torch.int64, device=device)
    blocks: list[Block] = []
    fault = None
    try:  # a process that fails must still answer: the others wait for all processes
        blocks = _own_blocks(optimizer)
        mine = _checksums(optimizer, blocks, batch_size).to(device)
    except Exception as error:
        fault = error
    gathered = [torch.empty_like(mine) for _ in range(group.size())]
    _communicate("all_gather", gathered, mine, group=group)
    if fault is not None:
        raise fault
    sizes, options, parameters, gradients = torch.stack(gathered).T.tolist()
    _check_alike(sizes, options, parameters)
    share = Share(sizes[group.rank()] / sum(sizes), group)
    if not _are_averages(gradients, sizes):
        _average_gradients(share, blocks, device)
    for block in blocks:
        mean = MeanProduct(block, share)
        for p in block.parameters:
            setattr(p, optimizer.bp_extension.savefield, mean)
    return share


class Share:
    """The share of one process in a batch.

    Attributes:
        weight: The share n_i / N of the batch's samples.
        group: The processes that share the batch.
    """

    def __init__(self, weight: float, group: Any) -> None:
        self.weight = weight
        self.group = group

    def loss(self, compute: Callable[[], Tensor | float]) -> float:
        """The mean of a loss over the whole batch.

        Args:
            compute: Computes the mean loss over the samples of this process.

        Returns:
            The weighted mean, the same in all processes.

        Raises:
            Exception: What `compute` raises; the other processes raise `RuntimeError`.
        """
        device = torch.device("cpu")
        if distributed.get_backend(self.group) == "nccl":
            device = torch.device("cuda", torch.cuda.current_device())
        like = torch.zeros(2, dtype=torch.float64, device=device)
        mean, failed = self.mean(lambda: like.new_tensor([float(compute()), 0.0]), like).tolist()
        if failed:  # NaN is true
            raise RuntimeError("The loss could not be computed in another process.")
        return float(mean)

    def mean(self, compute: Callable[[], Tensor], like: Tensor) -> Tensor:
        """The weighted mean of what the processes compute; if one process fails, all get NaN.

        Args:
            compute: Computes the tensor of this process.
            like: A tensor of the same shape, dtype and device.

        Returns:
            The mean, the same in all processes.
        """
        fault = None
        try:
            mean = self.weight * compute()
        except Exception as error:
            fault, mean = error, torch.full_like(like, math.nan)
        _communicate("all_reduce", mean, group=self.group)
        if fault is not None:
            raise fault
        return mean


class MeanProduct:
    """The mean of the processes' products with one block, `[V, n] → [V, n]`.

    Attributes:
        parameters: The parameters of the block.
        averaged: True. If several processes run, the optimizer refuses other products.
    """

    averaged = True

    def __init__(self, block: Block, share: Share) -> None:
        self.parameters = block.parameters
        self._block = block  # raises for another shape, which would break the all-reduce
        self._share = share

    def __call__(self, v: Tensor) -> Tensor:
        """Multiply each of the V rows of v, by one all-reduce."""
        return self._share.mean(lambda: self._block(v), v)


def _own_blocks(optimizer: CGNOptimizer) -> list[Block]:
    """The blocks of this process. Raise if `whole_batch` has averaged their products already."""
    blocks = optimizer.blocks()
    if any(getattr(block.product, "averaged", False) for block in blocks):
        raise RuntimeError(
            "The curvature products are averages over the processes already: call whole_batch once "
            "after each backward pass. Nothing has been changed."
        )
    return blocks


def _checksums(optimizer: CGNOptimizer, blocks: list[Block], batch_size: int) -> Tensor:
    """The batch size, and checksums of options, of parameters and starts, and of gradients."""
    if not (hasattr(batch_size, "__index__") and batch_size > 0):
        raise ValueError(
            "batch_size must be the number of samples of this process, at least 1, but is "
            f"{batch_size}: call whole_batch(optimizer, len(inputs)). Nothing has been changed."
        )
    # Addresses in memory differ between processes.
    text = [re.sub(" at 0x[0-9a-f]+", "", repr(optimizer.preconditioner))]
    for block in blocks:
        for name, p, group in zip(block.names, block.parameters, block.groups, strict=True):
            options = sorted(f"{k}={v}" for k, v in group.items() if not k.startswith("param"))
            text += [name, f"{p.shape} {p.dtype} {p in optimizer.state} of {block.names}", *options]
    parameters = [p for block in blocks for p in block.parameters]
    starts = [optimizer.state[p]["v"] for p in parameters if p in optimizer.state]
    sums = (
        torch.tensor(int(batch_size)),
        torch.tensor(zlib.crc32(repr(text).encode())),
        _fingerprint([*parameters, *starts]),
        _fingerprint(_gradients(blocks)),
    )
    return torch.stack([total.to(sums[2].device) for total in sums])


def _gradients(blocks: list[Block]) -> list[Tensor]:
    """The gradients of the blocks' parameters."""
    return [p.grad for block in blocks for p in block.parameters if p.grad is not None]


def _fingerprint(tensors: Iterable[Tensor]) -> Tensor:
    """A checksum of all bits of all tensors, weighted by their places; 0 if all bits are 0."""
    total = torch.tensor(0)
    for tensor in tensors:
        for chunk in tensor.detach().reshape(-1).view(torch.int16).split(CHUNK):
            places = torch.arange(1, 2 * len(chunk), 2, device=chunk.device)
            total = 1_000_003 * total.to(chunk.device) + (chunk * places).sum()  # wraps
    return total


def _check_alike(sizes: list[int], options: list[int], parameters: list[int]) -> None:
    """Raise in all processes unless all have blocks, the same options and the same parameters."""
    if faulty := [i for i, size in enumerate(sizes) if not size]:
        raise RuntimeError(
            f"No Newton step: process {faulty[0]} of {len(sizes)} could not take part, and its own "
            "error says why. Nothing has been changed."
        )
    for what, sums in (
        ("gradients, blocks or options (which parameters have gradients, lr, damping, …)", options),
        ("parameters or starting points: begin with one seed, or load one checkpoint", parameters),
    ):
        if len(set(sums)) > 1:
            other = next(i for i, total in enumerate(sums) if total != sums[0])
            raise RuntimeError(
                f"No Newton step: of {len(sums)} processes, process {other} differs from process 0 "
                f"in its {what}. Nothing has been changed."
            )


def _are_averages(gradients: list[int], sizes: list[int]) -> bool:
    """Whether gradients are averages already. Raise if the averages lack the weights n_i / N."""
    averaged = len(set(gradients)) == 1
    if averaged and gradients[0] and len(set(sizes)) > 1:
        raise ValueError(
            f"No Newton step: the processes have batches of {sizes} samples, but gradients that "
            "are averages without these weights already, as DistributedDataParallel leaves them. "
            "Give all the same number, or use plain modules. Nothing has been changed."
        )
    return averaged


def _average_gradients(share: Share, blocks: list[Block], device: torch.device) -> None:
    """Average all gradients by one all-reduce."""
    gradients = _gradients(blocks)
    flat = torch.cat([g.reshape(-1).to(device) for g in gradients])
    means = share.mean(lambda: flat, flat).split([g.numel() for g in gradients])
    for g, mean in zip(gradients, means, strict=True):
        g.copy_(mean.view_as(g))


def _communicate(collective: str, *tensors: Any, group: Any) -> None:
    """Call a collective of torch.distributed, and explain the error if the call fails."""
    try:
        getattr(distributed, collective)(*tensors, group=group)
    except Exception as error:
        raise ConnectionError(
            f"Another process does not answer: {str(error).rstrip('.')}. No parameter has been "
            "changed, but the processes cannot go on together: start all of them again from a "
            "checkpoint, as torchrun --max-restarts does."
        ) from error
