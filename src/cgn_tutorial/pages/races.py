"""Races of optimizers on the tutorial's networks: turn by turn, by the clock, on unseen images."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from backpack import backpack, extend
from backpack.extensions import GGNMP, HMP, PCHMP
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cgn_tutorial.cgn import CGNOptimizer
from cgn_tutorial.curvature import GGN, BlockProduct, layers
from cgn_tutorial.damping import LevenbergMarquardt
from cgn_tutorial.pages.data import MNIST_MEAN, MNIST_STD, load_mnist
from cgn_tutorial.pages.models import make_autoencoder, make_model
from cgn_tutorial.pages.training import accuracy, default_device

__all__ = [
    "METHODS",
    "Reconstruction",
    "Run",
    "Setting",
    "Test",
    "race",
    "step_rates",
    "train_autoencoder",
]

Update = Callable[[Tensor, Tensor], None]  # of a loss and its outputs: backward pass and step
Method = Callable[..., Update]  # of a model, a loss function, and options


def _gradient(
    optimizer_type: Callable[..., Any],
    model: nn.Module,
    loss_function: nn.Module,
    lr: float | Sequence[float],
) -> Update:
    """Steps along gradients alone, with one rate, or one per parameter."""
    parameters = list(model.parameters())
    rates = lr if isinstance(lr, Sequence) else [lr] * len(parameters)
    groups = [{"params": [p], "lr": rate} for p, rate in zip(parameters, rates, strict=True)]
    optimizer = optimizer_type(groups)

    def update(loss: Tensor, outputs: Tensor) -> None:
        loss.backward()
        optimizer.step()

    return update


def _autograd(
    blocks: Callable[[nn.Module], Iterable[Any]],
    model: nn.Module,
    loss_function: nn.Module,
    maxiter: int | Sequence[int] = 20,
    flat: Sequence[int] = (),
    adam_lr: float = 1e-2,
    **options: Any,
) -> Update:
    """Newton steps with the GGN in these blocks, and Adam's for parameters in none of them.

    The most products may differ from block to block. The blocks that `flat` counts, from 0, are
    solved as if they had no curvature but the damping.
    """
    curvature = GGN(blocks(model))
    budgets = [maxiter] * len(curvature.blocks) if isinstance(maxiter, int) else maxiter
    groups = [
        {"params": block, "maxiter": k} for block, k in zip(curvature.blocks, budgets, strict=True)
    ]
    optimizers: list[Any] = [CGNOptimizer(groups, curvature, **options)]
    inside = {p for block in curvature.blocks for p in block}
    if outside := [p for p in model.parameters() if p not in inside]:
        optimizers.append(Adam(outside, adam_lr))

    def update(loss: Tensor, outputs: Tensor) -> None:
        curvature.backward(loss, outputs)
        for block in (curvature.blocks[i] for i in flat):
            zero = BlockProduct(block, lambda block, v: [torch.zeros_like(v_p) for v_p in v])
            for p in block:
                setattr(p, curvature.savefield, zero)
        for optimizer in optimizers:
            optimizer.step()

    return update


def _backpack(
    extension: Callable[[], Any], model: nn.Module, loss_function: nn.Module, **options: Any
) -> Update:
    """Newton steps with a curvature of BackPACK's, per parameter."""
    extend(loss_function)
    optimizer = CGNOptimizer(extend(model).parameters(), extension(), **options)

    def update(loss: Tensor, outputs: Tensor) -> None:
        with backpack(optimizer.bp_extension):
            loss.backward()
        optimizer.step()

    return update


#: How each method is made from a model, a loss function and options. "CGN" has the GGN by autograd,
#: a block per layer, and "CGN, bounded" is the same for settings that bound the step's length;
#: "CGN + Adam" has Newton steps for the linear layers, and Adam for the convolutions, and
#: "Adam, two rates" a rate for each of these; "Hessian" stops CG at negative curvature.
METHODS: Mapping[str, Method] = {
    "SGD": partial(_gradient, SGD),
    "Momentum": partial(_gradient, partial(SGD, momentum=0.9, nesterov=True)),
    "Adam": partial(_gradient, Adam),
    "CGN": partial(_autograd, layers),
    "CGN + Adam": partial(_autograd, lambda model: layers(model)[2:]),
    "CGN per parameter": partial(_autograd, nn.Module.parameters),
    "CGN, BackPACK": partial(_backpack, GGNMP),
    "CGN, PCH-abs": partial(_backpack, partial(PCHMP, modify="abs")),
    "CGN, PCH-clip": partial(_backpack, partial(PCHMP, modify="clip")),
    "CGN, Hessian": partial(_backpack, HMP),
    "Adam, two rates": partial(_gradient, Adam),
    "CGN, bounded": partial(_autograd, layers),
}


@dataclass(frozen=True)
class Setting:
    """One way to train the tutorial's network.

    Attributes:
        method: A key of `METHODS`.
        options: What it is made with: `lr`, and for Newton steps what `CGNOptimizer` takes.
        batch_size: Images per step.
        activation: That of the model, `"Sigmoid"` or `"ReLU"`.
        average: Factor of a running average of the weights, which is what is tested; 0 for none.
    """

    method: str
    options: Mapping[str, Any]
    batch_size: int = 64
    activation: str = "Sigmoid"
    average: float = 0.0


class Test(NamedTuple):
    """A test on the way.

    Attributes:
        steps: Steps taken so far.
        seconds: Time spent on them, without loading data and testing.
        gradients: The same time in units of one gradient, a forward and a backward pass of a batch.
        accuracy: On the 10,000 test images, between 0 and 1.
    """

    steps: int
    seconds: float
    gradients: float
    accuracy: float


class Run:
    """A setting on its way, with a model and batches of its own.

    Args:
        setting: What trains.
        seed: Of the weights and the batches.

    Attributes:
        setting: As given.
        losses: The mini-batch loss before each step.
        tests: The tests so far.
        seconds: Time spent on the steps so far.
        failed: Whether a step met numbers beyond all bounds, and nothing more can follow.
    """

    def __init__(self, setting: Setting, seed: int) -> None:
        self.setting = setting
        self.losses: list[float] = []
        self.tests: list[Test] = []
        self.seconds = 0.0
        self.failed = False
        torch.manual_seed(seed)
        self._model = make_model(getattr(nn, setting.activation)).to(default_device())
        self._average = AveragedModel(
            self._model, multi_avg_fn=get_ema_multi_avg_fn(setting.average)
        )
        self._loss_function = nn.CrossEntropyLoss()
        self._batches = _batches(setting.batch_size, seed)
        self._update = METHODS[setting.method](self._model, self._loss_function, **setting.options)
        self._recent = 0.0  # a running mean of the mini-batch accuracy
        self._gradient_seconds: list[float] = []

    def turn(self, steps: int | None = None, *, test: bool = True) -> None:
        """Train until the next test, and test.

        A test takes longer than many a step. So tests are rare, each time the steps have grown by
        half, until mini-batches are recognised; then each time they have grown by a tenth.

        Args:
            steps: Train to this many steps at most.
            test: Whether to test at the end.
        """
        growth = 1.1 if self._recent > 0.8 else 1.5
        end = max(len(self.losses) + 1, math.ceil(growth * len(self.losses)))
        while len(self.losses) < min(end, steps or end):
            self._step(*next(self._batches))
            if self.failed:
                return
        if test:
            gradients = self.seconds / statistics.median(self._gradient_seconds)
            self.tests.append(Test(len(self.losses), self.seconds, gradients, self._test()))

    def reached(self, goal: float) -> Test | None:
        """The first test at or above the goal; `None` if there is none."""
        return next((test for test in self.tests if test.accuracy >= goal), None)

    def fell_back(self) -> bool:
        """Whether it failed, or lost a fifth of its test accuracy on the way."""
        best = 0.0
        for test in self.tests:
            if test.accuracy < best - 0.2:
                return True
            best = max(best, test.accuracy)
        return self.failed

    def _step(self, inputs: Tensor, targets: Tensor) -> None:
        begin = _clock()
        self._model.zero_grad()
        outputs = self._model(inputs)
        loss = self._loss_function(outputs, targets)
        try:
            self._update(loss, outputs)
        except RuntimeError:  # the optimizer's, about numbers that are not finite
            self.failed = True
            return
        if self.setting.average:
            self._average.update_parameters(self._model)
        self.seconds += _clock() - begin
        self.losses.append(loss.item())
        self.failed = not math.isfinite(self.losses[-1])
        self._recent += (accuracy(outputs, targets) - self._recent) / 2
        if len(self.losses) % 8 == 1:  # what one gradient costs
            begin = _clock()
            torch.autograd.grad(
                self._loss_function(self._model(inputs), targets), list(self._model.parameters())
            )
            self._gradient_seconds.append(_clock() - begin)

    @torch.no_grad()
    def _test(self) -> float:
        """The accuracy of the model, or of the average of its weights."""
        # Pooling is twice as fast in this order of memory.
        model = copy.deepcopy(self._average.module if self.setting.average else self._model)
        model = model.to(memory_format=torch.channels_last)
        inputs, targets = _images(train=False)
        return accuracy(torch.cat([model(part) for part in inputs.split(250)]), targets)


def race(
    settings: Sequence[Setting],
    seed: int,
    *,
    goal: float | None = None,
    seconds: float = math.inf,
    steps: int | None = None,
) -> list[Run]:
    """Let settings take turns, from the same weights on the same batches.

    In a race to a goal, a turn ends with a test, on all test images. Where torch uses one thread,
    the clock counts the processor's time, so that what else the machine does matters little; else
    that on the wall.

    Args:
        settings: What races.
        seed: Of the weights and the batches.
        goal: The test accuracy at which a run ends; `None` tests nothing.
        seconds: The seconds of training after which it ends in any case.
        steps: The steps after which it ends in any case.

    Returns:
        The runs, in order.
    """
    if steps is None and math.isinf(seconds) and (goal is None or goal >= 1):
        raise ValueError("A race needs an end: a goal below 1, seconds, or steps.")
    runs = [Run(setting, seed) for setting in settings]
    racing = runs
    while racing:
        for run in racing:
            run.turn(steps, test=goal is not None)
        racing = [
            run
            for run in racing
            if not (
                run.failed
                or (goal is not None and run.reached(goal))
                or run.seconds >= seconds
                or len(run.losses) >= (steps or math.inf)
            )
        ]
    return runs


def step_rates(setting: Setting, seed: int, steps: int = 15) -> list[float]:
    """The rates at which SGD would take steps as long as another method's, one per parameter.

    Args:
        setting: The other method.
        seed: Of the weights and the batches.
        steps: How many of its steps to look at.

    Returns:
        Per parameter, the median over the steps of the step's length over the gradient's.
    """
    run = Run(setting, seed)
    ratios: list[list[float]] = []
    for _ in range(steps):
        before = [p.detach().clone() for p in run._model.parameters()]
        run._step(*next(run._batches))
        ratios.append(
            [
                ((p.detach() - x).norm() / p.grad.norm()).item()
                for p, x in zip(run._model.parameters(), before, strict=True)
                if p.grad is not None
            ]
        )
    return [statistics.median(column) for column in zip(*ratios, strict=True)]


class Reconstruction(NamedTuple):
    """How well the autoencoder does at some point.

    Attributes:
        steps: Steps taken so far.
        seconds: Time spent on them, without loading data and testing.
        error: The squared error of an image, summed over its pixels, averaged over all test images.
        damping: λ by then; NaN for Adam.
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
    judge: str | None = "the same batch",
    batch_size: int = 500,
    seconds: float = math.inf,
    steps: int | None = None,
    **options: Any,
) -> list[Reconstruction]:
    """Train the autoencoder on the cross-entropy of its pixels.

    Args:
        seed: Of the weights and the batches.
        lr: The step size, or Adam's rate.
        damping: λ to begin with; `None` trains with Adam instead.
        judge: What Levenberg's and Marquardt's rule compares the loss on, `"the same batch"` or
            `"another batch"`; `None` keeps λ as it is.
        batch_size: Images per step.
        seconds: When to end.
        steps: The steps after which to end in any case.
        **options: Further ones of `CGNOptimizer`.

    Returns:
        The error each time the steps have grown by a fifth, up to the end or to numbers that are
        not finite.
    """
    torch.manual_seed(seed)
    model = make_autoencoder().to(default_device())
    curvature = GGN([model.parameters()])
    defaults = {"tol": 0.1, "maxiter": 30, "warm_start": 0.95}
    optimizer: Any = (
        Adam(model.parameters(), lr)
        if damping is None
        else CGNOptimizer(model.parameters(), curvature, lr, damping, **defaults | options)
    )
    adaptive = LevenbergMarquardt(optimizer) if damping is not None and judge else None

    def evaluate(pixels: Tensor, outputs: Tensor | None = None) -> Tensor:
        outputs = model(pixels) if outputs is None else outputs
        loss = nn.functional.binary_cross_entropy_with_logits(outputs, pixels, reduction="sum")
        return loss / len(pixels)

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
        elif judge == "the same batch":
            adaptive.step(loss, lambda: evaluate(pixels))
        else:
            with torch.no_grad():
                before = evaluate(others)
            adaptive.step(before, lambda: evaluate(others))

    batches = (_pixels(images) for images, _ in _batches(batch_size, seed))
    found: list[Reconstruction] = []
    spent, taken, next_test = 0.0, 0, 1
    while spent < seconds and taken < (steps or math.inf):
        pixels = next(batches)
        others = next(batches) if judge == "another batch" else pixels
        begin = _clock()
        try:
            update(pixels, others)
        except RuntimeError:  # the optimizer's, about numbers that are not finite
            break
        spent += _clock() - begin
        taken += 1
        if taken >= next_test:
            next_test = math.ceil(1.2 * taken)
            with torch.no_grad():
                images = _pixels(_images(train=False)[0])
                error = (model(images).sigmoid() - images).square().sum(dim=1).mean().item()
            lam = math.nan if damping is None else optimizer.param_groups[0]["damping"]
            found.append(Reconstruction(taken, spent, error, lam))
    return found


def _pixels(images: Tensor) -> Tensor:
    """Images as rows of pixels from 0 to 1."""
    return (images * MNIST_STD + MNIST_MEAN).clamp(0, 1).flatten(1)


def _clock() -> float:
    """Seconds: of this process, where it has one thread, else on the wall."""
    if default_device().type != "cpu":
        torch.accelerator.synchronize()
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def _batches(batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of one size without end, reshuffled for each pass over the training images."""
    images, labels = _images(train=True)
    random = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(images), generator=random).to(images.device)
        for chosen in order[: len(order) // batch_size * batch_size].split(batch_size):
            yield images[chosen], labels[chosen]


@cache
def _images(*, train: bool) -> tuple[Tensor, Tensor]:
    """Images and labels, on the device."""
    images, labels = load_mnist(train=train).tensors
    return images.to(default_device()), labels.to(default_device())
