"""One Newton step of several processes, each of which has a part of the batch.

Process i has n_i of the N samples, and a loss that is the mean over them. Gradient and curvature
products of the whole batch are the means of those of the processes, weighted by n_i / N. So
`whole_batch` replaces what lies on the parameters of each process by these means, between the
backward pass and the optimizer's `step()`, which then needs to know nothing of other processes.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, distributed

from cgn_tutorial.cgn import Block, CGNOptimizer

__all__ = ["Share", "whole_batch"]

CHUNK = 1 << 20  # numbers of a fingerprint at a time, which bounds its memory


def whole_batch(optimizer: CGNOptimizer, batch_size: int, group: Any = None) -> Share:
    """Make the gradients and curvature products of this process those of the whole batch.

    Call this function after the backward pass, and before `optimizer.step()`; with a closure, as
    the last line of the closure but its return:

        loss.backward()                                   # or curvature.backward(loss, outputs)
        share = whole_batch(optimizer, len(inputs))
        optimizer.step()

    Each product is averaged by one all-reduce whenever the solve asks for it. Gradients are
    averaged by one all-reduce a step, unless they are the same everywhere to the last bit, as
    DistributedDataParallel leaves them. All else is computed from these means, by each process for
    itself. So the processes need the same hardware and number of threads to go on with the same
    parameters, which this function makes sure of, by one all-gather a step.

    Args:
        optimizer: The optimizer of this process.
        batch_size: How many samples the loss of this process is the mean of.
        group: The processes that share the batch; `None` means all.

    Returns:
        What this process has of the batch: `share.loss` averages a loss.

    Raises:
        TypeError: `group` is not a group that this process belongs to.
        ValueError: `batch_size` is not a positive integer, or it differs between processes whose
            gradients have been averaged without weights.
        RuntimeError: A product is missing, or has been averaged already; parameters, options or
            gradients of the processes do not belong together. If one process raises, all of them
            do, and nothing has been changed.
        ConnectionError: Another process does not answer: it has died, or is late beyond the
            timeout of the group. No parameter has been changed.
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
    try:  # a process that fails must still tell the others, which would wait for it
        blocks = _own_blocks(optimizer)
        mine = _checksums(optimizer, blocks, batch_size).to(device)
    except Exception as error:
        fault = error
    gathered = [torch.empty_like(mine) for _ in range(group.size())]
    _communicate("all_gather", gathered, mine, group=group)
    if fault is not None:
        raise fault
    sizes, options, numbers, gradients = torch.stack(gathered).T.tolist()
    _check_alike(sizes, options, numbers)
    share = Share(sizes[group.rank()] / sum(sizes), group)
    if not _are_averages(gradients, sizes):
        _average_gradients(share, blocks, device)
    for block in blocks:
        mean = MeanProduct(block, share)
        for p in block.parameters:
            setattr(p, optimizer.bp_extension.savefield, mean)
    return share


class Share:
    """What one process has of a batch.

    Attributes:
        weight: The share n_i / N of the samples.
        group: The processes that share the batch.
    """

    def __init__(self, weight: float, group: Any) -> None:
        self.weight = weight
        self.group = group

    def loss(self, compute: Callable[[], Tensor | float]) -> float:
        """The mean of a loss over the whole batch.

        Args:
            compute: Computes the mean loss of this process.

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
        averaged: True, which the optimizer asks for if several processes run.
    """

    averaged = True

    def __init__(self, block: Block, share: Share) -> None:
        self.parameters = block.parameters
        self._block = block  # checks the shape, and another size would break the all-reduce
        self._share = share

    def __call__(self, v: Tensor) -> Tensor:
        """Multiply each of the V rows of v, by one all-reduce."""
        return self._share.mean(lambda: self._block(v), v)


def _own_blocks(optimizer: CGNOptimizer) -> list[Block]:
    """The blocks of this process, which must not be averages yet."""
    blocks = optimizer.blocks()
    if any(getattr(block.product, "averaged", False) for block in blocks):
        raise RuntimeError(
            "The curvature products are averages over the processes already: call whole_batch once "
            "after each backward pass. Nothing has been changed."
        )
    return blocks


def _checksums(optimizer: CGNOptimizer, blocks: list[Block], batch_size: int) -> Tensor:
    """Four integers: the batch size, and sums that differ if options, numbers or gradients do."""
    if not (hasattr(batch_size, "__index__") and batch_size > 0):
        raise ValueError(
            "batch_size must be the number of samples of this process, at least 1, but is "
            f"{batch_size}: call whole_batch(optimizer, len(inputs)). Nothing has been changed."
        )
    text: list[str] = []
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
    """The gradients of all parameters of these blocks."""
    return [p.grad for block in blocks for p in block.parameters if p.grad is not None]


def _fingerprint(tensors: Iterable[Tensor]) -> Tensor:
    """An integer that sums all bits of all tensors, weighted by their places; 0 for zeros."""
    total = torch.tensor(0)
    for tensor in tensors:
        for chunk in tensor.detach().reshape(-1).view(torch.int16).split(CHUNK):
            places = torch.arange(1, 2 * len(chunk), 2, device=chunk.device)
            total = 1_000_003 * total.to(chunk.device) + (chunk * places).sum()  # wraps
    return total


def _check_alike(sizes: list[int], options: list[int], numbers: list[int]) -> None:
    """Raise, in all processes alike, unless the processes can step together."""
    if faulty := [i for i, size in enumerate(sizes) if not size]:
        raise RuntimeError(
            f"No Newton step: process {faulty[0]} of {len(sizes)} could not take part, and its own "
            "error says why. Nothing has been changed."
        )
    for what, sums in (
        ("gradients, blocks or options: which parameters have a gradient, lr, damping", options),
        ("parameters or starting points: begin with one seed, or load one checkpoint", numbers),
    ):
        if len(set(sums)) > 1:
            other = next(i for i, total in enumerate(sums) if total != sums[0])
            raise RuntimeError(
                f"No Newton step: process {other} differs from process 0 in its {what}, in all of "
                f"the {len(sums)} processes. Nothing has been changed."
            )


def _are_averages(gradients: list[int], sizes: list[int]) -> bool:
    """Whether the gradients have been averaged already; raise if that was without the weights."""
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
    """Call a collective of torch.distributed, and say what it means if that fails."""
    try:
        getattr(distributed, collective)(*tensors, group=group)
    except Exception as error:
        raise ConnectionError(
            f"Another process does not answer: {str(error).rstrip('.')}. No parameter has been "
            "changed, but the processes cannot go on together: start all of them again from a "
            "checkpoint, as torchrun --max-restarts does."
        ) from error
