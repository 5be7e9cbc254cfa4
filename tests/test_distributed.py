"""Where `torch.distributed` runs several processes: real ones, over gloo."""

from __future__ import annotations

import copy
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from backpack import backpack, extend
from backpack.extensions import GGNMP
from torch import Tensor, distributed, multiprocessing, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from cgn_tutorial import GGN, CGNOptimizer, LevenbergMarquardt, layers, parallel, whole_batch
from cgn_tutorial.pages import train_parallel

pytestmark = [
    pytest.mark.skipif(
        not (distributed.is_available() and distributed.is_gloo_available()),
        reason="torch comes without gloo",
    ),
    pytest.mark.versions,
]

STEPS = 10
INPUTS = torch.randn(24, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGETS = torch.arange(24) % 4
UNEVEN = {2: [15, 9], 4: [7, 6, 10, 1]}

# Processes. On most systems a server imports what takes seconds once, and each process is a copy of
# the server. The server computes nothing: a process that has used torch cannot be copied safely.

FORKS = "forkserver" in multiprocessing.get_all_start_methods()
CONTEXT: Any = multiprocessing.get_context("forkserver" if FORKS else "spawn")
if FORKS:
    CONTEXT.set_forkserver_preload(["backpack.extensions", "cgn_tutorial.pages.train_parallel"])


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
    arguments = function, processes, str(folder), timeout
    started = [CONTEXT.Process(target=_process, args=(i, *arguments)) for i in range(processes)]
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
    ended = [code for i, code in enumerate(codes) if i != lost]
    assert ended == [0] * len(ended), f"exit codes {codes}: None is of one that hangs"
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

    def __init__(self, case: Case | None = None, group: Any = None, **options: Any) -> None:
        case = case or Case()
        self.group = group
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

    def share(self) -> Any:
        """Make what a backward pass has left that of the whole batch."""
        return whole_batch(self.optimizer, len(self.inputs), self.group)

    def step(self) -> None:
        """Step on what a backward pass has left."""
        if self.group is not None:
            self.share()
        self.optimizer.step()

    def adapt(self, loss: Tensor, evaluate: Callable[[], Any]) -> None:
        """Step, and let the damping adapt."""
        if self.group is not None:
            share, mine = self.share(), evaluate
            loss = share.loss(lambda: loss)
            evaluate = partial(share.loss, mine)
        self.adaptive.step(loss, evaluate)

    def train(self, steps: int) -> list[Tensor]:
        """The parameters after some steps."""
        for _ in range(steps):
            loss = self.backward()
            if self.adaptive:
                self.adapt(loss, self.evaluate)
            else:
                self.step()
        return self.parameters()

    def parameters(self) -> list[Tensor]:
        """Copies of the parameters."""
        return [p.detach().clone() for p in self.model.parameters()]


# On these, steps in one process, on the same batch in another order, end as close together as
# several processes must: looser damping or a tighter tolerance amplify rounding by far more.
ADAPTIVE = {"lr": 1.0, "damping": 1.0, "maxiter": 5}
OPTIONS = {"warm_start": 0.9, "max_length": 0.3, "weight_decay": 0.01, "maxiter": 4}
CASES = [
    *(  # each product with and without replicas, and in each dtype
        Case(products, replicated, dtype)
        for products in ("BackPACK", "layer", "network")
        for replicated, dtype in ((True, torch.float64), (False, torch.float32))
    ),
    *(Case(products, uneven=True) for products in ("BackPACK", "layer")),
    Case(options=tuple(OPTIONS.items())),
    Case("network", options=(*ADAPTIVE.items(), ("warm_start", 0.95)), adaptive=True),
    Case("network", options=tuple(ADAPTIVE.items()), adaptive=True, uneven=True),
]


# All with two processes, and some with one, or with four, which take turns on a small machine.
WAYS = [(case, 2) for case in CASES]
WAYS += [(case, 1) for case in CASES if case.replicated or (case.options and not case.uneven)]
WAYS += [
    (Case("BackPACK", replicated=True), 4),
    (Case("layer", dtype=torch.float32), 4),
    (Case("network", replicated=True), 4),
    (Case("layer", uneven=True), 4),
]


def trainings(i: int, groups: dict[int, Any]) -> dict[tuple[Case, int], list[list[Tensor]]]:
    """The parameters after the first and the last step, of each way with this process."""
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
        training = Training(case, groups[2], tol=1e-3)
        training.train(1)
        training.backward()
        with counted_collectives() as calls:
            training.step()
        found[case] = (
            calls,
            [(s.products, len(names)) for names, s in training.optimizer.solves.items()],
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


def no_batch_size(training: Training, faulty: bool) -> Callable[[], object]:
    training.backward()
    return lambda: whole_batch(training.optimizer, None if faulty else 12, training.group)


def no_samples(training: Training, faulty: bool) -> Callable[[], object]:
    training.backward()
    return lambda: whole_batch(training.optimizer, 0 if faulty else 12, training.group)


def averaged_twice(training: Training, faulty: bool) -> Callable[[], object]:
    training.backward()
    training.share()
    return training.share


def other_parameters(training: Training, faulty: bool) -> Callable[[], object]:
    if faulty:
        with torch.no_grad():
            weights = training.model[0].weight.view(-1)
            weights[:2] = weights[:2].flip(0)  # the same numbers, in another order
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
        training.optimizer.param_groups[0]["max_length"] = 1.0
    training.backward()
    return training.step


def frozen_parameter(training: Training, faulty: bool) -> Callable[[], object]:
    training.model[0].weight.requires_grad_(not faulty)
    training.backward()
    return training.step


def unequal_sizes_under_ddp(training: Training, faulty: bool) -> Callable[[], object]:
    if faulty:
        training.inputs, training.targets = training.inputs[:9], training.targets[:9]
    training.evaluated = replica(training)
    training.backward()
    return training.step


def no_average_under_ddp(training: Training, faulty: bool) -> Callable[[], object]:
    training.evaluated = replica(training)
    training.backward()
    return training.optimizer.step


def replica(training: Training) -> nn.Module:
    """The model under DistributedDataParallel."""
    return DistributedDataParallel(training.model, process_group=training.group)


NOT_FINITE = (
    "RuntimeError",
    "No Newton step for .*: .*not finite: up to nan.* No parameter has been",
)
THE_OTHER = "RuntimeError", "process 1 of 2 could not take part, and its own error says why"
ALIKE = "RuntimeError", "process 1 differs from process 0 in its "
SIZE = "ValueError", r"call whole_batch\(optimizer, len\(inputs\)\)"

# What the first and the second process raise.
FAULTS = {
    nan_batch: (NOT_FINITE, NOT_FINITE),
    nan_product: (NOT_FINITE, NOT_FINITE),
    broken_product: (NOT_FINITE, ("RuntimeError", "No Newton step for .*: broken. No parameter")),
    wrong_shape: (NOT_FINITE, ("RuntimeError", "No Newton step for .* must have shape")),
    missing_product: (THE_OTHER, ("RuntimeError", "no curvature product")),
    no_batch_size: (THE_OTHER, SIZE),
    no_samples: (THE_OTHER, SIZE),
    averaged_twice: ("RuntimeError", "call whole_batch once"),
    other_parameters: (ALIKE[0], ALIKE[1] + "parameters or starting points"),
    other_starting_point: (ALIKE[0], ALIKE[1] + "parameters or starting points"),
    no_starting_point: (ALIKE[0], ALIKE[1] + "gradients, blocks or options"),
    other_damping: (ALIKE[0], ALIKE[1] + "gradients, blocks or options"),
    other_max_length: (ALIKE[0], ALIKE[1] + "gradients, blocks or options"),
    frozen_parameter: (ALIKE[0], ALIKE[1] + "gradients, blocks or options"),
    unequal_sizes_under_ddp: (
        "ValueError",
        r"batches of \[12, 9\] samples, but gradients that are",
    ),
    no_average_under_ddp: (
        "RuntimeError",
        r"torch\.distributed runs several processes, .*drift apart.*whole_batch\(optimizer",
    ),
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


def adaptive_faults(i: int, groups: dict[int, Any]) -> dict[str, Any]:
    """What comes of a loss that one process cannot compute, or not as a number."""
    found = {}
    for name, evaluate in (("broken", broken), ("NaN", lambda: float("nan"))):
        training = Training(CASES[-2], groups[2])
        loss = training.backward()
        mine = evaluate if i == 1 else training.evaluate
        tried = outcome(training.model, partial(training.adapt, loss, mine))
        found[name] = tried, training.train(2), training.optimizer.param_groups[0]["damping"]
    return found


def test_a_loss_that_one_process_cannot_compute_raises_in_all(results):
    (first, *after), (second, *after_too) = (
        found["broken"] for found in results["adaptive_faults"][:2]
    )
    assert "could not be computed in another process" in first.message
    assert (second.error, second.message) == ("ArithmeticError", "broken")
    assert not first.moved
    assert not second.moved
    assert all(map(torch.equal, after[0], after_too[0]))
    assert after[1] == after_too[1]


def test_a_loss_that_is_nan_in_one_process_takes_the_step_back_in_all(results):
    first, second = (found["NaN"] for found in results["adaptive_faults"][:2])
    assert first[0] == second[0] == Outcome("", "", False)
    assert all(map(torch.equal, first[1], second[1]))
    assert first[2] == second[2]


# What else a group has to get along with.


def company(i: int, groups: dict[Any, Any]) -> dict[str, Any]:
    """Copies, checkpoints, gradients not yet averaged, closures, other processes."""
    group = groups[2]
    training = Training(Case(), group)
    training.train(1)

    loaded = Training(Case(), group)
    loaded.model.load_state_dict(training.model.state_dict())
    loaded.optimizer.load_state_dict(training.optimizer.state_dict())

    copied = Training(Case(), group)
    copied.train(1)
    copied.model, copied.curvature, copied.optimizer = copy.deepcopy(
        (copied.model, copied.curvature, copied.optimizer)
    )
    copied.evaluated = copied.model

    waiting = Training(Case(replicated=True), group)
    with waiting.evaluated.no_sync():
        waiting.backward()
    waiting.step()

    closed = Training(Case(), group)

    def closure() -> Tensor:
        loss = closed.backward()
        closed.share()
        return loss

    closed.optimizer.step(closure)
    return {
        "state": training.optimizer.state_dict(),
        "loaded": loaded.train(1),
        "copied": copied.train(1),
        "closure": closed.parameters(),
        "no_sync": waiting.parameters(),
        "stranger": outcome(
            training.model, lambda: whole_batch(training.optimizer, 12, groups["others"])
        ),
    }


def test_the_state_dict_is_that_of_one_process(results):
    alone = Training()
    alone.train(1)
    for found in results["company"][:2]:
        assert found["state"] == alone.optimizer.state_dict()


@pytest.mark.parametrize("way", ["loaded", "copied"])
def test_a_checkpoint_or_a_copy_goes_on_in_a_group(results, way):
    expected = Training().train(2)
    for found in results["company"][:2]:
        torch.testing.assert_close(found[way], expected, rtol=0.0, atol=1e-12)


def test_a_closure_may_average(results):
    expected = Training().train(1)
    for found in results["company"][:2]:
        torch.testing.assert_close(found["closure"], expected, rtol=0.0, atol=1e-12)


def test_gradients_that_ddp_has_not_averaged_are_averaged(results):
    expected = Training().train(1)
    for found in results["company"][:2]:
        torch.testing.assert_close(found["no_sync"], expected, rtol=0.0, atol=1e-12)


def test_a_group_of_others_is_refused(results):
    for found in results["company"][:2]:
        assert found["stranger"].error == "TypeError"
        assert "a group that this process belongs to" in found["stranger"].message


@pytest.mark.parametrize("group", [None, 0, "world", [0, 1]])
def test_a_group_is_a_process_group(group):
    training = Training()
    training.backward()
    with pytest.raises(TypeError, match="group must be a group that this process"):
        whole_batch(training.optimizer, 24, group)


def test_the_fingerprint_of_many_numbers_takes_little_memory(monkeypatch):
    lengths, arange = [], torch.arange

    def recorded(*arguments: int, **options: Any) -> Tensor:
        lengths.append(len(arange(*arguments)))
        return arange(*arguments, **options)

    monkeypatch.setattr(torch, "arange", recorded)
    numbers = torch.randn(3_000_001)
    fingerprint = parallel._fingerprint
    assert fingerprint([numbers]).item() == fingerprint([numbers.clone()]).item()
    assert fingerprint([numbers]).item() != fingerprint([numbers.flip(0)]).item()
    assert fingerprint([torch.zeros(9), torch.zeros(())]).item() == 0
    assert max(lengths) == parallel.CHUNK


def test_one_process_never_asks_torch_distributed_for_anything_but_whether_it_runs(monkeypatch):
    allowed = {"is_available", "is_initialized"}
    asked = set()

    class Watched:
        def __getattr__(self, name: str) -> Any:
            asked.add(name)
            return getattr(distributed, name)

    monkeypatch.setattr(torch, "distributed", Watched())
    training = Training()
    training.train(2)
    assert asked <= allowed


# Processes that die.

TIMEOUT = 5.0


def death(i: int, how: signal.Signals, last: int) -> tuple[Outcome, float]:
    """A step in which the last process is lost, within its second product."""
    training = Training(group=distributed.group.WORLD)
    training.train(2)
    training.backward()
    products = 0

    def fatal(product: Callable) -> Callable:
        def wrapped(v: Tensor) -> Tensor:
            nonlocal products
            products += 1
            if products == 2 and i == last:
                os.kill(os.getpid(), how)
            return product(v)

        return wrapped

    replace_product(training, fatal)
    start = time.monotonic()
    found = outcome(training.model, training.step)
    return found, time.monotonic() - start


@pytest.mark.skipif(os.name != "posix", reason="stops a process by a signal")
@pytest.mark.parametrize(("how", "processes"), [("SIGKILL", 3), ("SIGSTOP", 2)])
def test_the_loss_of_a_process_raises_in_the_others_within_the_timeout(how, processes, tmp_path):
    """One is killed, or stands still, which only the timeout can tell."""
    last = processes - 1
    lose = partial(death, how=signal.Signals[how], last=last)
    results = run(lose, tmp_path, processes, seconds=60, timeout=TIMEOUT, lost=last)
    for found, seconds in results[:last]:
        assert found.error == "ConnectionError", found
        assert "Another process does not answer" in found.message
        assert "start all of them again from a checkpoint" in found.message
        assert not found.moved
        assert seconds < (TIMEOUT if how == "SIGKILL" else TIMEOUT + 2)


# The script to download, started by torchrun.

SCRIPT = Path(train_parallel.__file__)
WATCHED = f"""
import os, pathlib, runpy
pathlib.Path("process" + os.environ["RANK"]).write_text(str(os.getpid()))
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


SCRIPT_STEPS, SCRIPT_BATCH = 12, 64


def undisturbed(i: int) -> tuple[dict[str, Tensor], list[float]]:
    """The script's training in two processes that nobody kills."""
    cpu = torch.device("cpu")
    model, losses = train_parallel.train(SCRIPT_STEPS, SCRIPT_BATCH, None, cpu)
    return model.state_dict(), losses


def torchrun(folder: Path, checkpoint: str, kill_at: str) -> list[str]:
    """What two processes print; the second is killed once the first has printed `kill_at`."""
    (folder / "watched.py").write_text(WATCHED)
    options = ["--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2", "--max-restarts=1"]
    training = [f"--steps={SCRIPT_STEPS}", f"--batch-size={SCRIPT_BATCH}"]
    training += ["--checkpoint", checkpoint]
    command = [sys.executable, "-m", "torch.distributed.run", *options, "watched.py", *training]
    lines = []
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # see the script
    }
    with subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as agent:

        def kill_all() -> None:
            for path in folder.glob("process*"):
                os.kill(int(path.read_text()), signal.SIGKILL)
            agent.kill()

        watchdog = threading.Timer(150, kill_all)
        watchdog.start()
        for line in agent.stdout:
            lines.append(line.strip())
            if kill_at and line.startswith(kill_at):
                os.kill(int((folder / "process1").read_text()), signal.SIGKILL)
                kill_at = ""
        watchdog.cancel()
    assert agent.returncode == 0
    return lines


@pytest.mark.skipif(os.name != "posix", reason="kills a process by a signal")
def test_a_killed_process_is_started_again_and_training_ends_as_if_nothing_had_been(tmp_path):
    (state, losses), _ = run(undisturbed, tmp_path, 2)
    steps = [f"step {i:3}: loss {loss:.5f}" for i, loss in enumerate(losses)]
    lines = torchrun(tmp_path, "killed.pt", kill_at="step   3")
    assert lines[:4] == steps[:4]
    (resumed,) = [line for line in lines if line.startswith("goes on from step")]
    first = int(resumed.split()[-1])
    assert 4 <= first < SCRIPT_STEPS
    assert lines[lines.index(resumed) + 1 :] == steps[first:]
    killed = torch.load(tmp_path / "killed.pt")
    assert killed["losses"] == losses
    for name, value in state.items():
        assert torch.equal(value, killed["model"][name])


@pytest.mark.gpu
def test_nccl_steps_as_without_it_in_a_group_of_one(tmp_path):
    """One GPU can hold no more than one process: what NCCL does between two is not tested."""
    if not distributed.is_nccl_available():
        pytest.skip("torch comes without NCCL")
    distributed.init_process_group(
        "nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        parameters = []
        for group in (distributed.group.WORLD, None):
            training = Training(Case(options=(("warm_start", 0.9),)), None)
            training.model.cuda()
            training.inputs, training.targets = training.inputs.cuda(), training.targets.cuda()
            training.group = group
            with counted_collectives() as calls:
                parameters.append(training.train(STEPS))
            assert bool(calls) == bool(group)
            training.adaptive = LevenbergMarquardt(training.optimizer)
            training.adapt(training.backward(), training.evaluate)
            parameters[-1] += training.parameters()
        assert all(map(torch.equal, *parameters))
    finally:
        distributed.destroy_process_group()


# The page of mistakes.

MISUSE = Path(__file__).parents[1] / "docs" / "misuse.rst"


def test_the_page_of_mistakes_names_each_fault_and_tests_that_exist():
    section = MISUSE.read_text(encoding="utf-8").partition("In several processes\n---")[2]
    rows = re.findall(r"^   \* - (.+)\n     - (.+)\n     - (.+)$", section, re.MULTILINE)[1:]
    named = [name for *_, check in rows for name in re.findall("`(.+?)`", check)]
    pages = {name for name in named if name.startswith("auto_examples/")}
    assert {name for name in named if name.startswith("test_")} <= globals().keys()
    faults = {name for name in named if not name.startswith("test_")} - pages
    assert faults == {fault.__name__ for fault in FAULTS}
    assert all((MISUSE.parents[1] / f"{page.replace('auto_', '')}.py").exists() for page in pages)


# Everything in one set of processes, since each takes seconds to start.

PARTS = [trainings, messages, faults, adaptive_faults, company]


def everything(i: int) -> dict[str, Any]:
    """What each part found in this process."""
    groups: dict[Any, Any] = {n: distributed.new_group(list(range(n))) for n in (1, 2, 4)}
    groups["others"] = distributed.new_group([2, 3])
    found = {"trainings": trainings(i, groups)}
    if i < 2:
        found |= {part.__name__: part(i, groups) for part in PARTS if part is not trainings}
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    found = run(everything, tmp_path_factory.mktemp("results"), 4)
    return {part.__name__: [of.get(part.__name__) for of in found] for part in PARTS}
