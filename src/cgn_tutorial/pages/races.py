"""Races of optimizers on the tutorial's networks, timed, and tested on unseen images."""

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

from cgn_tutorial import GGN, CGNOptimizer, layers
from cgn_tutorial.pages.data import load_mnist
from cgn_tutorial.pages.models import make_model
from cgn_tutorial.pages.training import accuracy, default_device, quiet

__all__ = ["METHODS", "Measurement", "Run", "Setting", "race", "step_rates"]

Update = Callable[[Tensor, Tensor], None]  # (loss, outputs): a backward pass and a step
Method = Callable[..., Update]  # (model, loss function, **options)


def _gradient(
    optimizer_type: Callable[..., Any],
    model: nn.Module,
    loss_function: nn.Module,
    lr: float | Sequence[float],
) -> Update:
    """Steps of an optimizer of torch, with one learning rate or one rate per parameter."""
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
    without_curvature: Sequence[int] = (),
    adam_lr: float = 1e-2,
    **options: Any,
) -> Update:
    """Newton steps with the GGN in these blocks, and Adam's steps for all other parameters.

    Each block may have its own `maxiter`. The blocks with numbers in `without_curvature`, counted
    from 0, take gradient steps v = −g / λ.
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
        for block in (curvature.blocks[i] for i in without_curvature):
            zero = _Zero(block)
            for p in block:
                setattr(p, curvature.savefield, zero)
        for optimizer in optimizers:
            optimizer.step()

    return update


@dataclass(frozen=True)
class _Zero:
    """The product over a block with C = 0."""

    parameters: Sequence[Tensor]

    def __call__(self, v: Tensor) -> Tensor:
        return torch.zeros_like(v)


def _backpack(
    extension: Callable[[], Any], model: nn.Module, loss_function: nn.Module, **options: Any
) -> Update:
    """Newton steps with an extension of BackPACK, with a block per parameter."""
    extend(loss_function)
    optimizer = CGNOptimizer(extend(model).parameters(), extension(), **options)

    def update(loss: Tensor, outputs: Tensor) -> None:
        with quiet(), backpack(optimizer.bp_extension):
            loss.backward()
        optimizer.step()

    return update


#: Each method makes an update from a model, a loss function and options. "CGN" uses the GGN by
#: autograd, with a block per layer. "CGN + Adam" takes Newton steps in the linear layers and Adam's
#: steps in the convolutions. Methods with a comma use a curvature of BackPACK, with a block per
#: parameter. "CGN, Hessian" stops CG at negative curvature.
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
}


@dataclass(frozen=True)
class Setting:
    """One way to train the tutorial's network.

    Attributes:
        method: A key of `METHODS`.
        options: The options of the method: `lr`, a number or a number per parameter, and for
            Newton steps the options of `CGNOptimizer`.
        batch_size: Images per step.
        activation: The activation of the model, `"Sigmoid"` or `"ReLU"`.
        average: The decay of a running average of the weights, which the tests use; 0 for none.
    """

    method: str
    options: Mapping[str, Any]
    batch_size: int = 64
    activation: str = "Sigmoid"
    average: float = 0.0


class Measurement(NamedTuple):
    """The result of a test during a run.

    Attributes:
        steps: Steps taken so far.
        seconds: Seconds of these steps, without loading data and testing.
        gradients: The same time, in forward and backward passes of a batch.
        accuracy: The accuracy on the 10,000 test images, between 0 and 1.
    """

    steps: int
    seconds: float
    gradients: float
    accuracy: float


class Run:
    """The training of a setting, with a model and batches of its own.

    Args:
        setting: The setting to train.
        seed: The seed of the weights and the batches.

    Attributes:
        setting: As given.
        model: The model to train.
        losses: The mini-batch loss before each step.
        tests: The tests so far.
        seconds: Seconds of the steps so far.
        failed: Whether a step met numbers that are not finite, which ends the run.
    """

    def __init__(self, setting: Setting, seed: int) -> None:
        self.setting = setting
        self.losses: list[float] = []
        self.tests: list[Measurement] = []
        self.seconds = 0.0
        self.failed = False
        torch.manual_seed(seed)
        self.model = make_model(getattr(nn, setting.activation)).to(default_device())
        self._average = AveragedModel(
            self.model, multi_avg_fn=get_ema_multi_avg_fn(setting.average)
        )
        self._loss_function = nn.CrossEntropyLoss()
        self._batches = draw_batches(setting.batch_size, seed)
        self._update = METHODS[setting.method](self.model, self._loss_function, **setting.options)
        self._recent = 0.0  # a running mean of the mini-batch accuracy
        self._gradient_seconds: list[float] = []

    def turn(self, steps: int | None = None, *, test: bool = True) -> None:
        """Train until the next test, and test.

        A test takes longer than many steps. So a test follows when the number of steps has grown by
        half, or, once the mini-batch accuracy exceeds 0.8, by a tenth.

        Args:
            steps: The most steps of the run, with the steps before this turn.
            test: Whether to test at the end.
        """
        growth = 1.1 if self._recent > 0.8 else 1.5
        end = max(len(self.losses) + 1, math.ceil(growth * len(self.losses)))
        while len(self.losses) < min(end, steps or end):
            self.step()
            if self.failed:
                return
        if test:
            gradients = self.seconds / statistics.median(self._gradient_seconds)
            self.tests.append(Measurement(len(self.losses), self.seconds, gradients, self.test()))

    def reached(self, goal: float) -> Measurement | None:
        """The first test with at least this accuracy; `None` if no test has reached the goal."""
        return next((test for test in self.tests if test.accuracy >= goal), None)

    def fell_back(self) -> bool:
        """Whether the run failed, or a test accuracy lies more than 0.2 below an earlier one."""
        best = 0.0
        for test in self.tests:
            if test.accuracy < best - 0.2:
                return True
            best = max(best, test.accuracy)
        return self.failed

    def step(self) -> None:
        """Take a step on the next batch, and record the loss and the time."""
        inputs, targets = next(self._batches)
        begin = clock()
        self.model.zero_grad()
        outputs = self.model(inputs)
        loss = self._loss_function(outputs, targets)
        try:
            self._update(loss, outputs)
        except RuntimeError:  # the optimizer met numbers that are not finite
            self.failed = True
            return
        if self.setting.average:
            self._average.update_parameters(self.model)
        self.seconds += clock() - begin
        self.losses.append(loss.item())
        self.failed = not math.isfinite(self.losses[-1])
        self._recent += (accuracy(outputs, targets) - self._recent) / 2
        if len(self.losses) % 8 == 1:  # measure what a gradient costs
            with quiet():
                begin = clock()
                torch.autograd.grad(
                    self._loss_function(self.model(inputs), targets), list(self.model.parameters())
                )
                self._gradient_seconds.append(clock() - begin)

    @torch.no_grad()
    def test(self) -> float:
        """The test accuracy of the model, or of the model with averaged weights."""
        # Pooling is twice as fast with channels last in memory.
        model = copy.deepcopy(self._average.module if self.setting.average else self.model)
        model = model.to(memory_format=torch.channels_last)
        inputs, targets = load_images(train=False)
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

    In a race to a goal, a turn ends with a test on all test images. If torch uses one thread, the
    clock counts processor time, since other work of the machine changes that time little. Otherwise
    the clock counts wall-clock time.

    Args:
        settings: The settings that race.
        seed: The seed of the weights and the batches.
        goal: The test accuracy at which a run ends; `None` tests nothing.
        seconds: A run ends after this many seconds of training, if not before.
        steps: A run ends after this many steps, if not before.

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
    """The learning rates, one per parameter, with which SGD's steps are as long as a method's.

    Args:
        setting: The setting of the method.
        seed: The seed of the weights and the batches.
        steps: The number of steps to measure.

    Returns:
        For each parameter, the median over the steps of ‖step‖ / ‖gradient‖.
    """
    run = Run(setting, seed)
    ratios: list[list[float]] = []
    for _ in range(steps):
        before = [p.detach().clone() for p in run.model.parameters()]
        run.step()
        ratios.append(
            [
                ((p.detach() - x).norm() / p.grad.norm()).item()
                for p, x in zip(run.model.parameters(), before, strict=True)
                if p.grad is not None
            ]
        )
    return [statistics.median(column) for column in zip(*ratios, strict=True)]


def clock() -> float:
    """Seconds of processor time if torch uses one thread on a CPU, else of wall-clock time."""
    if default_device().type != "cpu":
        torch.accelerator.synchronize()
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def draw_batches(batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of one size, in a new order for each pass over the training images."""
    inputs, labels = load_images(train=True)
    random = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(inputs), generator=random).to(inputs.device)
        for chosen in order[: len(order) // batch_size * batch_size].split(batch_size):
            yield inputs[chosen], labels[chosen]


@cache
def load_images(*, train: bool) -> tuple[Tensor, Tensor]:
    """The images and labels of MNIST, on the default device."""
    inputs, labels = load_mnist(train=train).tensors
    return inputs.to(default_device()), labels.to(default_device())
