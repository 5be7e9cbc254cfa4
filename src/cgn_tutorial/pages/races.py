"""Races of optimizers on the tutorial's networks, timed, and tested on unseen images."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import resources
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import LBFGS, SGD, Adam, Optimizer, RMSprop

from cgn_tutorial import GGN, Block, CGNOptimizer, layers
from cgn_tutorial.pages.data import load_mnist
from cgn_tutorial.pages.models import make_mlp, make_model
from cgn_tutorial.pages.training import accuracy, default_device

__all__ = [
    "METHODS",
    "NETWORKS",
    "Measurement",
    "Run",
    "Setting",
    "Way",
    "load_experiments",
    "race",
]

#: The last of the training images: no run trains on them, so that settings are chosen by them.
HELD_OUT = 2500

#: The networks that race, by name.
NETWORKS: Mapping[str, Callable[[], nn.Module]] = {
    "sigmoid CNN": make_model,
    "ReLU CNN": partial(make_model, nn.ReLU),
    "sigmoid MLP": make_mlp,
}


class Way(NamedTuple):
    """How a method trains a model.

    Attributes:
        optimizers: The optimizers, whose rates a schedule lowers.
        step: A step on a batch of inputs and targets; returns the loss and the outputs before it.
    """

    optimizers: Sequence[Optimizer]
    step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


Method = Callable[..., Any]  # (model, loss function, **options) to a Way


def _gradient(
    make: Callable[..., Optimizer], model: nn.Module, loss_function: nn.Module, **options: Any
) -> Way:
    """Steps of an optimizer of torch for all parameters."""
    optimizer = make(model.parameters(), **options)

    def step(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        found: list[tuple[Tensor, Tensor]] = []

        def closure() -> float:
            model.zero_grad()
            outputs = model(inputs)
            loss = loss_function(outputs, targets)
            loss.backward()
            found.append((loss, outputs))
            return float(loss.detach())

        optimizer.step(closure)  # L-BFGS evaluates the loss several times
        return found[0]

    return Way([optimizer], step)


def _sgd(parameters: Iterable[Tensor], lr: float, momentum: float = 0.0) -> SGD:
    """SGD, with Nesterov's momentum if there is any."""
    return SGD(parameters, lr, momentum, nesterov=momentum > 0, fused=True)


def _muon(
    model: nn.Module,
    loss_function: nn.Module,
    lr: float,
    momentum: float,
    adam_lr: float,
    betas: tuple[float, float],
) -> Way:
    """Muon for the matrices of hidden layers, kernels as matrices, and Adam for all the rest."""
    *hidden, last = [p for p in model.parameters() if p.ndim > 1]
    rest = [last, *(p for p in model.parameters() if p.ndim == 1)]
    optimizers = [_muon_of(hidden, lr, momentum), Adam(rest, adam_lr, betas, fused=True)]

    def step(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        model.zero_grad()
        outputs = model(inputs)
        loss = loss_function(outputs, targets)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        return loss, outputs

    return Way(optimizers, step)


def _muon_of(weights: Sequence[Tensor], lr: float, momentum: float) -> Optimizer:
    """Muon for weights, each taken for a matrix with a row for each output, in the same memory.

    Torch has Muon since version 2.9.
    """
    matrices = [_matrix(p.detach()).requires_grad_() for p in weights]
    muon: Optimizer = torch.optim.Muon(matrices, lr, weight_decay=0.0, momentum=momentum)

    def take_gradients(*_: Any) -> None:
        for matrix, p in zip(matrices, weights, strict=True):
            matrix.grad = None if p.grad is None else _matrix(p.grad)

    muon.register_step_pre_hook(take_gradients)
    return muon


def _matrix(p: Tensor) -> Tensor:
    """A weight as a matrix with a row for each output, in the same memory."""
    return p.flatten(1) if p.is_contiguous() else p.permute(0, 2, 3, 1).flatten(1)


def _newton(
    model: nn.Module,
    loss_function: nn.Module,
    last: int | None = None,
    maxiter: int | Sequence[int] = 20,
    adam_lr: float = 1e-2,
    betas: tuple[float, float] = (0.9, 0.999),
    muon_lr: float | None = None,
    momentum: float = 0.95,
    without_curvature: Sequence[int] = (),
    keep_length: bool = False,
    **options: Any,
) -> Way:
    """Newton steps in the `last` layers, or in all, a block each, and Adam's steps in the others.

    With `muon_lr`, Muon moves the matrices of the others, and Adam their biases. Each block may
    have its own `maxiter`. The blocks with numbers in `without_curvature`, counted from 0, take
    gradient steps: those of C = 0, or, to `keep_length`, steps as long as the Newton steps in their
    place, after `max_length`.
    """
    curvature = GGN(layers(model)[-last if last else None :])
    budgets = [maxiter] * len(curvature.blocks) if isinstance(maxiter, int) else maxiter
    groups = [
        {"params": block, "maxiter": k} for block, k in zip(curvature.blocks, budgets, strict=True)
    ]
    newton = CGNOptimizer(groups, curvature, **options)
    optimizers: list[Optimizer] = [newton]
    inside = {p for block in curvature.blocks for p in block}
    outside = [p for p in model.parameters() if p not in inside]
    if muon_lr is not None:
        optimizers.append(_muon_of([p for p in outside if p.ndim > 1], muon_lr, momentum))
        outside = [p for p in outside if p.ndim == 1]
    if outside:
        optimizers.append(Adam(outside, adam_lr, betas, fused=True))

    def step(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        model.zero_grad()
        outputs = model(inputs)
        loss = loss_function(outputs, targets)
        curvature.backward(loss, outputs)
        turned = [block for i, block in enumerate(newton.blocks()) if i in without_curvature]
        starts = [[p.detach().clone() for p in block.parameters] for block in turned]
        if not keep_length:
            for block in turned:
                flat = _Flat(block.parameters)
                for p in block.parameters:
                    setattr(p, curvature.savefield, flat)
        for optimizer in optimizers:
            optimizer.step()
        if keep_length:
            for block, start in zip(turned, starts, strict=True):
                _turn_downhill(block, start)
        return loss, outputs

    return Way(optimizers, step)


@dataclass(frozen=True)
class _Flat:
    """The product over a block without curvature, C = 0."""

    parameters: Sequence[Tensor]

    def __call__(self, v: Tensor) -> Tensor:
        return torch.zeros_like(v)


@torch.no_grad()
def _turn_downhill(block: Block, start: Sequence[Tensor]) -> None:
    """Turn a block's move from its start to the negative gradient, and keep the move's length."""
    moves = [p - x for p, x in zip(block.parameters, start, strict=True)]
    gradients = [p.grad for p in block.parameters if p.grad is not None]
    scale = get_total_norm(moves) / get_total_norm(gradients)
    for p, x in zip(block.parameters, start, strict=True):
        p.copy_(x if p.grad is None else x - scale * p.grad)


#: Each method makes a `Way` from a model, a loss function and options. "CGN" takes Newton steps
#: with the GGN by autograd, a block per layer. "CGN + Adam" and "CGN + Muon" take Newton steps in
#: the `last` layers, and the other method's steps in the others. "Muon" takes Adam's steps in the
#: last layer and for biases. One more line adds a rival.
METHODS: Mapping[str, Method] = {
    "SGD": partial(_gradient, _sgd),
    "Adam": partial(_gradient, partial(Adam, fused=True)),
    "RMSprop": partial(_gradient, RMSprop),
    "Muon": _muon,
    "L-BFGS": partial(_gradient, LBFGS),
    "CGN": _newton,
    "CGN + Adam": partial(_newton, last=2),
    "CGN + Muon": partial(_newton, last=1, muon_lr=0.2),
}

#: How a rate falls: its factor after a share t of the steps. The run ends at t = 1.
SCHEDULES: Mapping[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "linear": lambda t: 1 - t,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
}


@dataclass(frozen=True)
class Setting:
    """One way to train one of the networks.

    Attributes:
        method: A key of `METHODS`.
        options: The options of the method, such as `lr`; for Newton steps, those of `CGNOptimizer`.
        batch_size: Images per step.
        network: A key of `NETWORKS`.
        average: The decay of a running average of the weights, which the tests use; 0 for none.
        schedule: How the rates fall, `"constant"`, `"linear"` or `"cosine"`.
        horizon: The steps after which the rates have fallen to zero, and the run ends.
        channels_last: Whether kernels have their channels last in memory, which changes the time of
            a step only.
    """

    method: str
    options: Mapping[str, Any]
    batch_size: int = 64
    network: str = "sigmoid CNN"
    average: float = 0.0
    schedule: str = "constant"
    horizon: int | None = None
    channels_last: bool = False

    def __post_init__(self) -> None:
        if (self.schedule == "constant") != (self.horizon is None):
            raise ValueError("A rate that falls needs a horizon, and a constant rate has none.")


class Measurement(NamedTuple):
    """The result of a test during a run.

    Attributes:
        steps: Steps taken so far.
        seconds: Seconds of these steps, without loading data and testing.
        accuracy: The accuracy on the unseen images, between 0 and 1.
    """

    steps: int
    seconds: float
    accuracy: float


class Run:
    """The training of a setting, with a model and batches of its own.

    Args:
        setting: The setting to train.
        seed: The seed of the weights and the batches.
        tuning: Whether to test on the training images that are held out, rather than on the test
            images.

    Attributes:
        setting: As given.
        model: The model to train.
        losses: The mini-batch loss before each step.
        tests: The tests so far.
        seconds: Seconds of the steps so far.
        failed: Whether a step met numbers that are not finite, which ends the run.
    """

    def __init__(self, setting: Setting, seed: int, *, tuning: bool = False) -> None:
        self.setting = setting
        self.losses: list[float] = []
        self.tests: list[Measurement] = []
        self.seconds = 0.0
        self.failed = False
        torch.manual_seed(seed)
        self.model = NETWORKS[setting.network]().to(default_device())
        if setting.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self._average = copy.deepcopy(self.model)
        self._loss_function = nn.CrossEntropyLoss()
        self._batches = draw_batches(setting.batch_size, seed, held_out=HELD_OUT)
        self._way = METHODS[setting.method](self.model, self._loss_function, **setting.options)
        self._rates = [
            (group, group["lr"]) for way in self._way.optimizers for group in way.param_groups
        ]
        self._recent = 0.0  # a running mean of the mini-batch accuracy
        self._tuning = tuning

    def turn(self, steps: int | None = None, goals: Sequence[float] = ()) -> None:
        """Train until the next test, and test.

        A test takes longer than many steps. So a test follows when the number of steps has grown by
        half, or, once the mini-batch accuracy exceeds 0.8, by a seventh.

        Args:
            steps: The most steps of the run, with the steps before this turn.
            goals: The accuracies that tests look for; with none, there is no test.
        """
        growth = 1.15 if self._recent > 0.8 else 1.5
        end = max(len(self.losses) + 1, math.ceil(growth * len(self.losses)))
        while len(self.losses) < min(end, steps or end, self.setting.horizon or end):
            self.step()
            if self.failed:
                return
        if goals:
            goal = next((goal for goal in goals if not self.reached(goal)), goals[-1])
            self.tests.append(Measurement(len(self.losses), self.seconds, self.test(goal)))

    def reached(self, goal: float) -> Measurement | None:
        """The first test with at least this accuracy; `None` if no test has reached the goal."""
        return next((test for test in self.tests if test.accuracy >= goal), None)

    def ended(
        self, goals: Sequence[float] = (), seconds: float = math.inf, steps: int | None = None
    ) -> bool:
        """Whether the run has failed, or has come to its end, the last goal, or a limit."""
        return (
            self.failed
            or (len(goals) > 0 and self.reached(goals[-1]) is not None)
            or self.seconds >= seconds
            or len(self.losses) >= min(steps or math.inf, self.setting.horizon or math.inf)
        )

    def step(self) -> None:
        """Take a step on the next batch, and record the loss and the time."""
        inputs, targets = next(self._batches)
        begin = clock()
        if self.setting.horizon:
            factor = SCHEDULES[self.setting.schedule](len(self.losses) / self.setting.horizon)
            for group, rate in self._rates:
                group["lr"] = factor * rate
        try:
            loss, outputs = self._way.step(inputs, targets)
        except RuntimeError:  # the optimizer met numbers that are not finite
            self.failed = True
            return
        if self.setting.average:
            self._follow()
        self.seconds += clock() - begin
        self.losses.append(loss.item())
        self.failed = not math.isfinite(self.losses[-1])
        self._recent += (accuracy(outputs, targets) - self._recent) / 2

    @torch.no_grad()
    def _follow(self) -> None:
        """Move the average towards the weights; the first step's weights begin it."""
        weight = 1 - self.setting.average if self.losses else 1.0
        for mean, p in zip(self._average.parameters(), self.model.parameters(), strict=True):
            mean.lerp_(p, weight)

    @torch.no_grad()
    def test(self, goal: float = 0.0) -> float:
        """The accuracy of the model, or of the model with averaged weights, on unseen images.

        The first quarter of the test images is enough if it is 0.02 or more below the goal, which
        is over four standard deviations of that quarter.
        """
        # Pooling is twice as fast with channels last in memory.
        model = copy.deepcopy(self._average if self.setting.average else self.model)
        model = model.to(memory_format=torch.channels_last)
        inputs, targets = load_images(train=self._tuning)
        if self._tuning:
            inputs, targets = inputs[-HELD_OUT:], targets[-HELD_OUT:]
        outputs: list[Tensor] = []
        for part in inputs.split(250):
            outputs.append(model(part))
            if 250 * len(outputs) == 2500:
                found = accuracy(torch.cat(outputs), targets[:2500])
                if found <= goal - 0.02:
                    return found
        return accuracy(torch.cat(outputs), targets)


def race(
    settings: Sequence[Setting],
    seed: int,
    *,
    goals: Sequence[float] = (),
    seconds: float = math.inf,
    steps: int | None = None,
) -> list[Run]:
    """Let settings take turns, from the same weights on the same batches.

    In a race to goals, a turn ends with a test on all test images. If torch uses one thread, the
    clock counts processor time, since other work of the machine changes that time little. Otherwise
    the clock counts wall-clock time.

    Args:
        settings: The settings that race.
        seed: The seed of the weights and the batches.
        goals: The test accuracies to reach, in order; a run ends at the last. With none, nothing is
            tested.
        seconds: A run ends after this many seconds of training, if not before.
        steps: A run ends after this many steps, if not before.

    Returns:
        The runs, in order.
    """
    if steps is None and math.isinf(seconds) and (not goals or goals[-1] >= 1):
        raise ValueError("A race needs an end: a last goal below 1, seconds, or steps.")
    runs = [Run(setting, seed) for setting in settings]
    go_on(runs, goals=goals, seconds=seconds, steps=steps)
    return runs


def go_on(
    runs: Sequence[Run],
    *,
    goals: Sequence[float] = (),
    seconds: float = math.inf,
    steps: int | None = None,
) -> None:
    """Let runs take turns until each has ended, as `race` does."""
    while racing := [run for run in runs if not run.ended(goals, seconds, steps)]:
        for run in racing:
            run.turn(steps, goals)


def clock() -> float:
    """Seconds of processor time if torch uses one thread on a CPU, else of wall-clock time."""
    if default_device().type != "cpu":
        torch.accelerator.synchronize()
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def draw_batches(batch_size: int, seed: int, held_out: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches of one size, in a new order for each pass over the training images.

    The last `held_out` training images never come.
    """
    inputs, labels = (t[: len(t) - held_out] for t in load_images(train=True))
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


def load_experiments() -> dict[str, Any]:
    """What the full experiments found, as tables of the site's page "Experiments in full" have it.

    Returns:
        A dictionary of the following.

        `"races"`: for each network, goal and contender, the `"setting"` that tuning chose, and the
        `"steps"` and `"seconds"` to the goal from five seeds, `None` for a run that did not get
        there. `"ablation"`: mean late losses, three seeds each. `"beside Muon"`: steps to the goals
        with such steps in the last layer. `"costs"`: milliseconds per step.
    """
    file = resources.files("cgn_tutorial.pages") / "races.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found
