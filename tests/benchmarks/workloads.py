"""What the benchmarks measure: the main page's training run, and the curvature of one batch."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from backpack import backpack, extend
from backpack.extensions import GGNMP
from measuring import DEVICE, seconds
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cgn_tutorial import CGNOptimizer
from cgn_tutorial.curvature import GGN, BlockProduct, layers
from cgn_tutorial.pages import load_mnist, load_published_run, make_model, mnist_loader

CONFIG = load_published_run()["config"]
SOLVER = {name: CONFIG[name] for name in ("lr", "damping", "maxiter", "tol", "atol")}
BATCH_SIZE: int = CONFIG["batch_size"]
STEPS = 51  # iterations 0 to 50


def mnist(count: int, train: bool = True) -> tuple[Tensor, Tensor]:
    """The first images and labels."""
    images, labels = load_mnist(train)[:count]
    return images.to(DEVICE), labels.to(DEVICE)


class Run:
    """A training run from its seed, one step at a time."""

    def __init__(
        self,
        products: str = "layer",
        optimizer_type: type[torch.optim.Optimizer] = CGNOptimizer,
        seed: int = CONFIG["seed"],
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> None:
        torch.manual_seed(seed)
        self.model = make_model().to(DEVICE, dtype)
        self.loss_function: nn.Module = nn.CrossEntropyLoss()
        extension: Any
        if products == "BackPACK":
            extend(self.model)
            extend(self.loss_function)
            extension = GGNMP()
        else:
            parameters = list(self.model.parameters())
            blocks: dict[str, Any] = {
                "parameter": parameters,
                "layer": layers(self.model),
                "network": [parameters],
            }
            extension = GGN(blocks[products])
        self.extension = extension
        self.optimizer = optimizer_type(self.model.parameters(), extension, **SOLVER | options)
        self.batches = [
            (x.to(DEVICE, dtype), y.to(DEVICE)) for x, y in islice(mnist_loader(BATCH_SIZE), STEPS)
        ]
        self.losses: list[float] = []
        self.products: list[int] = []
        self.seconds: list[float] = []

    def backward(self, loss: Tensor, outputs: Tensor) -> None:
        """Leave gradients and products."""
        if isinstance(self.extension, GGNMP):
            with backpack(self.extension):
                loss.backward()
        else:
            self.extension.backward(loss, outputs)

    def _step(self) -> Tensor:
        inputs, targets = self.batches[len(self.losses)]
        self.optimizer.zero_grad()
        outputs = self.model(inputs)
        loss: Tensor = self.loss_function(outputs, targets)
        self.backward(loss, outputs)
        self.optimizer.step()
        return loss

    def step(self) -> None:
        """Take the next step and keep its time."""
        loss: list[Tensor] = []
        self.seconds.append(seconds(lambda: loss.append(self._step())))
        self.losses.append(loss[0].item())
        self.products.append(
            sum(s.products for s in getattr(self.optimizer, "solves", {}).values())
        )

    @property
    def printed(self) -> list[str]:
        """The losses as the main page prints them."""
        return [f"{loss:.5f}" for loss in self.losses]

    def test_loss(self) -> float:
        """The loss over the test images."""
        inputs, targets = mnist(10_000, train=False)
        with torch.no_grad():
            return cross_entropy(self.model(inputs), targets).item()


class Problem:
    """A model, a batch, and the products of the GGN there."""

    def __init__(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> None:
        self.model, self.inputs, self.targets = model, inputs, targets
        self.parameters = list(model.parameters())

    def gradient(self) -> Tensor:
        """A plain forward and backward pass."""
        self.model.zero_grad()
        loss = cross_entropy(self.model(self.inputs), self.targets)
        loss.backward()
        return loss

    def products(self, blocks: Any = None) -> list[BlockProduct]:
        """The products that one forward and one backward pass leave, whole network by default."""
        self.model.zero_grad()
        outputs = self.model(self.inputs)
        loss = cross_entropy(outputs, self.targets)
        return GGN(blocks or [self.parameters]).backward(loss, outputs)
