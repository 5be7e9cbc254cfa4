"""What a step costs in several processes, and where that stops paying."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from measuring import MB, Row, linear_fit, summary
from torch import distributed
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import cross_entropy

from cgn_tutorial import GGN, CGNOptimizer, layers, whole_batch
from cgn_tutorial.pages import load_mnist, make_model
from cgn_tutorial.pages.plotting import COLORS

PROCESSES = (1, 2, 4)
BATCH_SIZE, MAXITER = 512, 10

# Latency in seconds, and bandwidth in bytes per second.
NETWORKS = {"10 Gbit/s, 50 µs": (50e-6, 10e9 / 8), "100 Gbit/s, 5 µs": (5e-6, 100e9 / 8)}
GROWN = (1, 16)  # times the batch


load_once = cache(load_mnist)


class Step:
    """A step on a share of the batch, of always the same products, that goes nowhere."""

    def __init__(self, group: Any, first: int, count: int) -> None:
        images, labels = load_once()[first : first + count]
        self.inputs, self.targets = images, labels
        torch.manual_seed(0)
        self.model = make_model()
        self.curvature = GGN(layers(self.model))
        self.optimizer = CGNOptimizer(
            self.model.parameters(),
            self.curvature,
            lr=0.0,
            maxiter=MAXITER,
            tol=0.0,
            atol=0.0,
        )
        self.group = group

    def __call__(self) -> None:
        """Take it."""
        self.optimizer.zero_grad()
        outputs = self.model(self.inputs)
        self.curvature.backward(cross_entropy(outputs, self.targets), outputs)
        whole_batch(self.optimizer, len(self.inputs), self.group)
        self.optimizer.step()


@contextmanager
def counted() -> Iterator[list[int]]:
    """The bytes of each all-reduce."""
    sizes: list[int] = []
    all_reduce = distributed.all_reduce

    def counting(tensor: torch.Tensor, **options: Any) -> object:
        sizes.append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, **options)

    with mock.patch.object(distributed, "all_reduce", counting):
        yield sizes


def _measure(i: int, rounds: int, folder: str) -> None:
    """Measure in one process; the first of them writes what it found."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=i, world_size=max(PROCESSES)
    )
    groups = {n: distributed.new_group(list(range(n))) for n in PROCESSES}
    works: dict[tuple[str, int], Callable[[], object]] = {}
    for n in PROCESSES:
        count = BATCH_SIZE // n
        if i < n:
            works["step", n] = Step(groups[n], i * count, count)
            number = torch.zeros(1)
            works["all-reduce", n] = partial(distributed.all_reduce, number, group=groups[n])
        if i == 0:  # a share of the batch, without the others
            works["share", n] = Step(groups[1], 0, count)
    found: dict[tuple[str, int], list[float]] = {}
    sizes: dict[int, list[int]] = {}
    for turn in range(rounds + 1):
        for kind in ("step", "all-reduce", "share"):
            for n in PROCESSES:
                distributed.barrier()
                if work := works.get((kind, n)):
                    start = time.perf_counter()
                    for _ in range(repeats := 20 if kind == "all-reduce" else 1):
                        work()
                    if turn:  # the first warms up
                        seconds = (time.perf_counter() - start) / repeats
                        found.setdefault((kind, n), []).append(seconds)
    for n in PROCESSES:
        if step := works.get(("step", n)):
            with counted() as sizes[n]:
                step()
    if i == 0:
        torch.save((found, sizes), f"{folder}/found")
    distributed.barrier()
    distributed.destroy_process_group()


def bench_processes(quick: bool) -> tuple[list[Row], list[Row], Figure]:
    """A step in 1, 2 and 4 processes, and what it would take on a cluster."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (2 if quick else 15, folder)
        spawn(_measure, arguments, nprocs=max(PROCESSES))
        found, sizes = torch.load(Path(folder) / "found")
    table: list[Row] = [
        {
            "processes": str(n),
            "images each": str(BATCH_SIZE // n),
            "milliseconds per step": summary([1e3 * s for s in found["step", n]], 0),
            "times as fast": summary(np.divide(found["step", 1], found["step", n]).tolist()),
            "without the others, ms": summary([1e3 * s for s in found["share", n]], 0),
            "all-reduces per step": str(len(sizes[n])),
            "MB averaged": f"{sum(sizes[n]) / MB:.2f}",
            "MB sent by each": f"{ring(n) * sum(sizes[n]) / MB:.2f}",
            "ms per all-reduce of one number": summary([1e3 * s for s in found["all-reduce", n]]),
        }
        for n in PROCESSES
    ]
    shares = [1 / n for n in PROCESSES]
    fixed, work, _ = linear_fit(shares, [statistics.median(found["share", n]) for n in PROCESSES])
    return table, *model_scaling(fixed, work, len(sizes[2]), sum(sizes[2]))


def model_scaling(fixed: float, work: float, k: int, volume: int) -> tuple[list[Row], Figure]:
    """What a step would take on a cluster: all-reduces, `k` of `volume` bytes, beside the work."""
    scaling: list[Row] = []
    figure, axes = plt.subplots(len(GROWN), 1, figsize=(5, 6), sharex=True, layout="constrained")
    P = np.arange(1, 1025)
    for ax, grown in zip(axes, GROWN, strict=True):
        ideal = fixed + grown * work / P
        ax.loglog(P, ideal, color="black", linestyle=":", label="no messages")
        styles = zip(NETWORKS.items(), ("orange", "blue"), ("--", "-"), strict=True)
        for (label, (latency, bandwidth)), color, line in styles:
            seconds = ideal + 2 * k * latency * (P - 1) + ring(P) * volume / bandwidth
            best = int(seconds.argmin())
            root = math.sqrt((grown * work - 2 * volume / bandwidth) / (2 * k * latency))
            ax.loglog(P, seconds, color=COLORS[color], linestyle=line, label=label)
            ax.plot(P[best], seconds[best], "o", color=COLORS[color])
            scaling.append(
                {
                    "images in the batch": f"{grown * BATCH_SIZE:,}",
                    "network": label,
                    "work to share T, s": f"{grown * work:.2f}",
                    "fixed t₀, s": f"{fixed:.3f}",
                    "all-reduces k": str(k),
                    "MB averaged": f"{volume / MB:.2f}",
                    "best number of processes": str(P[best]),
                    "by the formula P*": f"{root:.0f}",
                    "seconds per step there": f"{seconds[best]:.3f}",
                    "times as fast as one": f"{seconds[0] / seconds[best]:.1f}",
                }
            )
        ax.set(title=f"batch of {grown * BATCH_SIZE:,}", ylabel="seconds per step, modelled")
    axes[0].legend(frameon=False)
    axes[-1].set(xlabel="processes")
    return scaling, figure


def ring(P: Any) -> Any:
    """How often each process sends the numbers that a ring of P averages."""
    return 2 * (P - 1) / P
