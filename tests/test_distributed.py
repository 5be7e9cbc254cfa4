"""Where `torch.distributed` runs several processes: real ones, over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from cgn_tutorial import GGN, CGNOptimizer, layers

pytestmark = pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()),
    reason="torch comes without gloo",
)

INPUTS = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGETS = torch.arange(8) % 4


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def run(function, folder: Path, processes: int = 2) -> list:
    """What the function returned in each process."""
    arguments = function, processes, str(folder)
    multiprocessing.spawn(_process, arguments, nprocs=processes)
    return [torch.load(folder / f"result{rank}") for rank in range(processes)]


def _process(rank: int, function, processes: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=processes
    )
    try:
        torch.save(function(rank), f"{folder}/result{rank}")
    finally:
        distributed.destroy_process_group()


def averaged_gradients(rank: int) -> list[torch.Tensor]:
    model = network()
    replica = DistributedDataParallel(model)
    half = slice(rank * 4, rank * 4 + 4)
    outputs = replica(INPUTS[half])
    loss = nn.functional.cross_entropy(outputs, TARGETS[half])
    GGN(layers(model)).backward(loss, outputs)
    return [p.grad for p in model.parameters()]


def test_data_parallel_replicas_get_the_average_gradient(tmp_path):
    model = network()
    nn.functional.cross_entropy(model(INPUTS), TARGETS).backward()
    expected = [p.grad for p in model.parameters()]
    for gradients in run(averaged_gradients, tmp_path):
        torch.testing.assert_close(gradients, expected, rtol=1e-12, atol=1e-15)


def refused_step(rank: int) -> tuple[str, bool]:
    model = network()
    curvature = GGN(layers(model))
    optimizer = CGNOptimizer(model.parameters(), curvature)
    outputs = model(INPUTS)
    curvature.backward(nn.functional.cross_entropy(outputs, TARGETS), outputs)
    before = [p.detach().clone() for p in model.parameters()]
    message = ""
    try:
        optimizer.step()
    except RuntimeError as error:
        message = str(error)
    same = all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    return message, same


def test_steps_of_several_processes_are_refused(tmp_path):
    for message, same in run(refused_step, tmp_path):
        assert "torch.distributed runs 2: each would solve with the curvature of its own" in message
        assert same


def test_one_process_steps_as_without_torch_distributed(tmp_path):
    ((message, same),) = run(refused_step, tmp_path, processes=1)
    assert not message
    assert not same
