"""Where `torch.distributed` runs several processes: real ones, over gloo."""

from __future__ import annotations

import copy
import os
import pickle
import re
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from backpack import backpack, extend
from backpack.extensions import GGNMP
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from cgn_tutorial import GGN, CGNOptimizer, LevenbergMarquardt, layers

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()),
    reason="torch comes without gloo",
)

STEPS = 20
INPUTS = torch.randn(24, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGETS = torch.arange(24) % 4
UNEVEN = {2: [15, 9], 4: [7, 6, 10, 1]}

# Processes.


def run(
    function: Callable[[int], object],
    folder: Path,
    processes: int,
    *,
    seconds: float = 200,
    timeout: float = 60,
    lost: int | None = None,
) -> list[Any]:
    """What the function returned in each process; all but a lost one end by themselves, in time."""
    context = multiprocessing.get_context("spawn")
    arguments = function, processes, str(folder), timeout
    started = [context.Process(target=_process, args=(i, *arguments)) for i in range(processes)]
    end = time.monotonic() + seconds
    try:
        for process in started:
            process.start()
        for process in (process for i, process in enumerate(started) if i != lost):
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in started]
    finally:
        for process in started:
            process.kill()
            process.join()
    assert [code for i, code in enumerate(codes) if i != lost] == [0] * (
        processes - (lost is not None)
    )
    return [
        None if i == lost else torch.load(folder / f"result{i}", weights_only=False)
        for i in range(processes)
    ]


def _process(
    i: int, function: Callable[[int], object], processes: int, folder: str, timeout: float
) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=i,
        world_size=processes,
        timeout=timedelta(seconds=timeout),
    )
    torch.save(function(i), f"{folder}/result{i}")
    os._exit(0)  # without waiting for what belongs to others, which may be dead


class Outcome(NamedTuple):
    """What came of a step in one process."""

    error: str
    message: str
    moved: bool


def outcome(model: nn.Module, step: Callable[[], object]) -> Outcome:
    """Try a step."""
    before = [p.detach().clone() for p in model.parameters()]
    error = message = ""
    try:
        step()
    except Exception as raised:
        error, message = type(raised).__name__, str(raised)
    pairs = zip(model.parameters(), before, strict=True)
    return Outcome(error, message, not all(torch.equal(p, b) for p, b in pairs))


@contextmanager
def counted_collectives():
    """The bytes of each collective of `torch.distributed`, by its name."""
    calls: list[tuple[str, int]] = []
    originals = {name: getattr(distributed, name) for name in ("all_reduce", "all_gather")}

    def counted(name: str, *tensors: Any, **options: Any) -> None:
        calls.append((name, tensors[-1].numel() * tensors[-1].element_size()))
        originals[name](*tensors, **options)

    for name in originals:
        setattr(distributed, name, partial(counted, name))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(distributed, name, original)


# Training, in one process or several.


class Case(NamedTuple):
    """A way to train."""

    products: str = "layer"  # or "BackPACK", "network"
    replicated: bool = False  # under DistributedDataParallel
    dtype: torch.dtype = torch.float64
    uneven: bool = False
    options: tuple[tuple[str, float], ...] = ()
    adaptive: bool = False


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Sigmoid(), nn.Linear(5, 4)).double()


class Training:
    """A model, its share of the batch, and an optimizer; without a group, all of the batch."""

    def __init__(
        self, case: Case = Case(), group: Any = None, *, grouped: bool = True, **options: Any
    ) -> None:
        self.model: Any = network().to(case.dtype)
        self.loss_function: nn.Module = nn.CrossEntropyLoss()
        if case.products == "BackPACK":
            self.curvature: Any = GGNMP()
            extend(self.model)
            extend(self.loss_function)
        else:
            whole = [list(self.model.parameters())]
            self.curvature = GGN(layers(self.model) if case.products == "layer" else whole)
        self.evaluated = self.model
        self.part = slice(None)
        if group is not None:
            processes, i = group.size(), group.rank()
            sizes = UNEVEN[processes] if case.uneven else [24 // processes] * processes
            self.part = slice(sum(sizes[:i]), sum(sizes[: i + 1]))
            if case.replicated:
                self.evaluated = DistributedDataParallel(self.model, process_group=group)
        settings = {"lr": 0.5, "damping": 1e-2, "tol": 0.3} | dict(case.options) | options
        if grouped:
            settings["process_group"] = group
        self.optimizer = CGNOptimizer(self.model.parameters(), self.curvature, **settings)
        self.adaptive = LevenbergMarquardt(self.optimizer) if case.adaptive else None
        self.inputs = INPUTS[self.part].to(case.dtype)
        self.targets = TARGETS[self.part]

    def backward(self) -> Tensor:
        """Leave gradients and products."""
        self.optimizer.zero_grad()
        outputs = self.evaluated(self.inputs)
        loss = self.loss_function(outputs, self.targets)
        if isinstance(self.curvature, GGN):
            self.curvature.backward(loss, outputs)
        else:
            with backpack(self.curvature):
                loss.backward()
        return loss

    def evaluate(self) -> Tensor:
        """The loss again."""
        return cross_entropy(self.model(self.inputs), self.targets)

    def step(self) -> None:
        """Step on what a backward pass has left."""
        self.optimizer.step(batch_size=len(self.inputs))

    def train(self, steps: int) -> list[Tensor]:
        """The parameters after some steps."""
        for _ in range(steps):
            loss = self.backward()
            if self.adaptive:
                self.adaptive.step(loss, self.evaluate, batch_size=len(self.inputs))
            else:
                self.step()
        return self.parameters()

    def parameters(self) -> list[Tensor]:
        """Copies of the parameters."""
        return [p.detach().clone() for p in self.model.parameters()]


# On these, 20 steps in one process, on the same batch in another order, end as close together as
# several processes must: looser damping or a tighter tolerance amplify rounding by far more.
ADAPTIVE = {"lr": 1.0, "damping": 1.0, "maxiter": 5}
OPTIONS = {"warm_start": 0.9, "max_length": 0.3, "weight_decay": 0.01, "maxiter": 4}
CASES = [
    *(
        Case(*values)
        for values in product(
            ("BackPACK", "layer", "network"), (True, False), (torch.float64, torch.float32)
        )
    ),
    *(Case(products, uneven=True) for products in ("BackPACK", "layer")),
    Case(options=tuple(OPTIONS.items())),
    Case("network", options=(*ADAPTIVE.items(), ("warm_start", 0.95)), adaptive=True),
    Case("network", options=tuple(ADAPTIVE.items()), adaptive=True, uneven=True),
]


# All with two processes, and some with four, which take turns on the cores of a small machine.
WAYS = [(case, 2) for case in CASES]
WAYS += [(case, 1) for case in CASES if not case.uneven]
WAYS += [
    (Case("BackPACK", replicated=True), 4),
    (Case("layer", dtype=torch.float32), 4),
    (Case("network", replicated=True), 4),
    (Case("layer", uneven=True), 4),
]


def trainings(i: int, groups: dict[int, Any]) -> dict[tuple[Case, int], list[list[Tensor]]]:
    """The parameters after the first and the last step, of each way that this process is part of."""
    results = {}
    for case, processes in WAYS:
        if i < processes:
            training = Training(case, groups[processes])
            results[case, processes] = [training.train(1), training.train(STEPS - 1)]
    return results


@pytest.mark.parametrize(("case", "processes"), WAYS, ids=str)
def test_several_processes_take_the_steps_of_one_on_the_whole_batch(results, case, processes):
    alone = Training(case)
    before = alone.evaluate()
    exact = case.dtype == torch.float64
    for step, tolerance in enumerate([1e-10, 1e-10] if exact else [1e-6, 1e-3]):
        expected = alone.train([1, STEPS - 1][step])
        for result in results["trainings"][:processes]:
            found = result[case, processes][step]
            if processes == 1:
                assert all(map(torch.equal, found, expected))
            torch.testing.assert_close(found, expected, rtol=0.0, atol=tolerance)
            assert all(map(torch.equal, found, results["trainings"][0][case, processes][step]))
    assert alone.evaluate() < before - 0.1


# What they say to each other.


def messages(i: int, groups: dict[int, Any]) -> dict[str, Any]:
    """The collectives of a step, and the products it took."""
    found = {}
    for case in (Case(), Case(replicated=True)):
        training = Training(case, groups[2])
        training.train(1)
        training.backward()
        with counted_collectives() as calls:
            training.step()
        found[case] = (
            calls,
            [(solve.products, len(solve.names)) for solve in training.optimizer.solves],
        )
    return found


@pytest.mark.parametrize("replicated", [False, True])
def test_one_all_reduce_per_product_and_block(results, replicated):
    for found in results["messages"][:2]:
        calls, solves = found[Case(replicated=replicated)]
        n_bytes = [8 * (3 * 5 + 5), 8 * (5 * 4 + 4)]
        expected = [("all_gather", 4 * 8)]
        if not replicated:
            expected += [("all_reduce", sum(n_bytes))]  # the gradient
        for (products, _), n in zip(solves, n_bytes, strict=True):
            expected += [("all_reduce", n)] * products
        assert calls == expected
        assert len(solves) == 2
        assert all(products > 1 for products, _ in solves)


# Faults. Each is one of the second process, unless it says otherwise.


def broken(*arguments: object) -> None:
    raise ArithmeticError("broken")


def nan_batch(training: Training, faulty: bool) -> Callable[[], object]:
    if faulty:
        training.inputs = training.inputs * float("nan")
    training.backward()
    return training.step


def nan_product(training: Training, faulty: bool) -> Callable[[], object]:
    training.backward()
    if faulty:
        replace_product(training, lambda product: lambda v: product(v) * float("nan"))
    return training.step


def broken_product(training: Training, faulty: bool) -> Callable[[], object]:
    training.backward()
    if faulty:
        replace_product(training, lambda product: broken)
    return training.step


def wrong_shape(training: Training, faulty: bool) -> Callable[[], object]:
    training.backward()
    if faulty:
        replace_product(training, lambda product: lambda v: product(v)[:, :-1])
    return training.step


def replace_product(training: Training, changed: Callable) -> None:
    """Change the product of the last layer."""
    layer = training.model[2]
    own = changed(layer.weight.ggn_product)

    def replaced(v: Tensor) -> Tensor:
        return own(v)

    replaced.parameters = list(layer.parameters())
    layer.weight.ggn_product = layer.bias.ggn_product = replaced


def missing_product(training: Training, faulty: bool) -> Callable[[], object]:
    training.backward()
    if faulty:
        del training.model[0].bias.ggn_product
    return training.step


def broken_closure(training: Training, faulty: bool) -> Callable[[], object]:
    closure = broken if faulty else training.backward
    return lambda: training.optimizer.step(closure, batch_size=12)


def no_batch_size(training: Training, faulty: bool) -> Callable[[], object]:
    training.backward()
    return lambda: training.optimizer.step(batch_size=None if faulty else 12)


def no_batch_size_anywhere(training: Training, faulty: bool) -> Callable[[], object]:
    training.backward()
    return training.optimizer.step


def no_samples(training: Training, faulty: bool) -> Callable[[], object]:
    training.backward()
    return lambda: training.optimizer.step(batch_size=0 if faulty else 12)


def other_parameters(training: Training, faulty: bool) -> Callable[[], object]:
    if faulty:
        with torch.no_grad():
            training.model[0].weight[0, 0] += 1e-15
            training.model[0].weight[0, 1] -= 1e-15
    training.backward()
    return training.step


def other_starting_point(training: Training, faulty: bool) -> Callable[[], object]:
    training.optimizer.param_groups[0]["warm_start"] = 0.5
    training.train(1)
    if faulty:
        training.optimizer.state[training.model[0].bias]["v"][0] += 1e-10
    training.backward()
    return training.step


def no_starting_point(training: Training, faulty: bool) -> Callable[[], object]:
    training.optimizer.param_groups[0]["warm_start"] = 0.5
    training.train(1)
    if faulty:
        training.optimizer.state.clear()
    training.backward()
    return training.step


def other_damping(training: Training, faulty: bool) -> Callable[[], object]:
    if faulty:
        training.optimizer.param_groups[0]["damping"] *= 2
    training.backward()
    return training.step


def other_max_length(training: Training, faulty: bool) -> Callable[[], object]:
    if faulty:
        training.optimizer.max_length = 1.0
    training.backward()
    return training.step


def frozen_parameter(training: Training, faulty: bool) -> Callable[[], object]:
    training.model[0].weight.requires_grad_(not faulty)
    training.backward()
    return training.step


def lopsided_product(training: Training, faulty: bool) -> Callable[[], object]:
    training.backward()
    if faulty:
        replace_product(training, lambda product: lambda v: product(v).roll(1, 1))
    return training.optimizer.check_products


def missing_product_to_check(training: Training, faulty: bool) -> Callable[[], object]:
    missing_product(training, faulty)
    return training.optimizer.check_products


NOT_FINITE = (
    "RuntimeError",
    "No Newton step for .*: .*not finite: up to nan.* No parameter has been",
)
THE_OTHER = "RuntimeError", "process 1 of 2 could not take part, and its own error says why"
ALIKE = "RuntimeError", "process 1 differs from process 0 in its "
SIZE = "ValueError", r"call optimizer.step\(batch_size=len\(inputs\)\)"

# What the first and the second process raise.
FAULTS = {
    nan_batch: (NOT_FINITE, NOT_FINITE),
    nan_product: (NOT_FINITE, NOT_FINITE),
    broken_product: (NOT_FINITE, ("RuntimeError", "No Newton step for .*: broken. No parameter")),
    wrong_shape: (NOT_FINITE, ("RuntimeError", "No Newton step for .* must have shape")),
    missing_product: (THE_OTHER, ("RuntimeError", "no curvature product")),
    broken_closure: (THE_OTHER, ("ArithmeticError", "broken")),
    no_batch_size: (THE_OTHER, SIZE),
    no_batch_size_anywhere: (SIZE, SIZE),
    no_samples: (THE_OTHER, SIZE),
    other_parameters: (ALIKE[0], ALIKE[1] + "parameters or starting points"),
    other_starting_point: (ALIKE[0], ALIKE[1] + "parameters or starting points"),
    no_starting_point: (ALIKE[0], ALIKE[1] + "gradients, blocks or options"),
    other_damping: (ALIKE[0], ALIKE[1] + "gradients, blocks or options"),
    other_max_length: (ALIKE[0], ALIKE[1] + "gradients, blocks or options"),
    frozen_parameter: (ALIKE[0], ALIKE[1] + "gradients, blocks or options"),
    lopsided_product: (("RuntimeError", "is not symmetric"),) * 2,
    missing_product_to_check: (THE_OTHER, ("RuntimeError", "no curvature product")),
}


def faults(i: int, groups: dict[int, Any]) -> dict[str, tuple[Outcome, bool]]:
    """The outcome of each fault, and whether a new training then goes on."""
    found = {}
    for fault in FAULTS:
        training = Training(Case(), groups[2])
        tried = outcome(training.model, fault(training, i == 1))
        found[fault.__name__] = (
            tried,
            outcome(network(), lambda: Training(Case(), groups[2]).train(1)),
        )
    return found


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_in_one_process_raises_in_all_and_moves_nothing(results, fault):
    expected = FAULTS[fault]
    if isinstance(expected[0], str):
        expected = expected, expected
    for found, (error, message) in zip(results["faults"][:2], expected, strict=True):
        tried, after = found[fault.__name__]
        assert tried.error == error, tried
        assert re.search(message, tried.message), tried
        assert not tried.moved
        assert not after.error, after


# Everything in one set of processes, since each takes seconds to start.

PARTS = [trainings, messages, faults]


def everything(i: int) -> dict[str, Any]:
    """What each part found in this process."""
    groups = {n: distributed.new_group(list(range(n))) for n in (1, 2, 4)}
    found = {"trainings": trainings(i, groups)}
    if i < 2:
        found |= {part.__name__: part(i, groups) for part in PARTS if part is not trainings}
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    found = run(everything, tmp_path_factory.mktemp("results"), 4)
    return {part.__name__: [of.get(part.__name__) for of in found] for part in PARTS}
