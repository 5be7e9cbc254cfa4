"""Train a deep autoencoder by Newton steps, with fixed or adaptive damping, or by Adam."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Adam

from cgn_tutorial import GGN, CGNOptimizer, LevenbergMarquardt
from cgn_tutorial.pages.data import MNIST_MEAN, MNIST_STD
from cgn_tutorial.pages.models import make_autoencoder
from cgn_tutorial.pages.races import clock, draw_batches, load_images
from cgn_tutorial.pages.training import default_device

__all__ = ["Reconstruction", "train_autoencoder"]


class Reconstruction(NamedTuple):
    """The test error of the autoencoder during the training.

    Attributes:
        steps: Steps taken so far.
        seconds: Seconds of these steps, without loading data and testing.
        error: The squared error of an image, summed over its pixels, averaged over all test images.
        damping: λ after these steps; NaN for Adam.
    """

    steps: int
    seconds: float
    error: float
    damping: float


def train_autoencoder(
    seed: int,
    *,
    lr: float = 1.0,
    damping: float | None = 0.03,
    adapt_to: str | None = "the same batch",
    batch_size: int = 500,
    seconds: float = math.inf,
    steps: int | None = None,
    **options: Any,
) -> list[Reconstruction]:
    """Train the autoencoder on the cross-entropy of its pixels.

    Args:
        seed: The seed of the weights and the batches.
        lr: The step size γ, or the learning rate of Adam.
        damping: The first λ; `None` trains with Adam.
        adapt_to: The batch on which `LevenbergMarquardt` compares the losses before and after a
            step, `"the same batch"` as the gradient's, or `"another batch"`; `None` keeps λ fixed.
        batch_size: Images per step.
        seconds: The training ends after this many seconds.
        steps: The training ends after this many steps, if not before.
        **options: Further options of `CGNOptimizer`.

    Returns:
        Measurements. The number of steps grows by a fifth between measurements. The list ends when
        the training ends or meets numbers that are not finite.

    Raises:
        ValueError: `adapt_to` is not one of these values.
    """
    if adapt_to not in ("the same batch", "another batch", None):
        raise ValueError(
            f"adapt_to must be 'the same batch', 'another batch' or None, but is {adapt_to!r}."
        )
    torch.manual_seed(seed)
    model = make_autoencoder().to(default_device())
    curvature = GGN([model.parameters()])
    defaults = {"tol": 0.1, "maxiter": 30, "warm_start": 0.95}
    optimizer: Any = (
        Adam(model.parameters(), lr)
        if damping is None
        else CGNOptimizer(model.parameters(), curvature, lr, damping, **defaults | options)
    )
    adaptive = LevenbergMarquardt(optimizer) if damping is not None and adapt_to else None

    def evaluate(pixels: Tensor, outputs: Tensor | None = None) -> Tensor:
        outputs = model(pixels) if outputs is None else outputs
        loss = nn.functional.binary_cross_entropy_with_logits(outputs, pixels, reduction="sum")
        return loss / len(pixels)

    @torch.no_grad()
    def value(pixels: Tensor) -> float:
        return evaluate(pixels).item()

    def update(pixels: Tensor, others: Tensor) -> None:
        model.zero_grad()
        outputs = model(pixels)
        loss = evaluate(pixels, outputs)
        if damping is None:
            loss.backward()
        else:
            curvature.backward(loss, outputs)
        if adaptive is None:
            optimizer.step()
        elif adapt_to == "the same batch":
            adaptive.step(loss.item(), lambda: value(pixels))
        else:
            adaptive.step(value(others), lambda: value(others))

    batches = (_pixels(images) for images, _ in draw_batches(batch_size, seed))
    found: list[Reconstruction] = []
    spent, taken, next_test = 0.0, 0, 1
    while spent < seconds and taken < (steps or math.inf):
        pixels = next(batches)
        others = next(batches) if adapt_to == "another batch" else pixels
        begin = clock()
        try:
            update(pixels, others)
        except RuntimeError:  # the optimizer met numbers that are not finite
            break
        spent += clock() - begin
        taken += 1
        if taken >= next_test:
            next_test = math.ceil(1.2 * taken)
            with torch.no_grad():
                images = _pixels(load_images(train=False)[0])
                error = (model(images).sigmoid() - images).square().sum(dim=1).mean().item()
            lam = math.nan if damping is None else optimizer.param_groups[0]["damping"]
            found.append(Reconstruction(taken, spent, error, lam))
    return found


def _pixels(images: Tensor) -> Tensor:
    """Images as rows of pixels from 0 to 1."""
    return (images * MNIST_STD + MNIST_MEAN).clamp(0, 1).flatten(1)
