"""The files to copy work away from the package, each alone and both together."""

import subprocess
import sys
from pathlib import Path

import cgn_tutorial

PACKAGE = Path(cgn_tutorial.__file__).parent

SETTING = """
import sys
sys.modules |= {"cgn_tutorial": None, "backpack": None}  # importing them fails
sys.path.insert(0, sys.argv[1])
import torch

torch.manual_seed(0)
inputs = torch.randn(64, 2)
targets = torch.sin(inputs[:, :1]) * inputs[:, 1:]
model = torch.nn.Sequential(torch.nn.Linear(2, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1))
parameters = list(model.parameters())
"""

TRAINING = """
losses = []
for _ in range(15):
    model.zero_grad()
    outputs = model(inputs)
    loss = (outputs - targets).square().mean()
    step(loss, outputs)
    losses.append(loss.item())
print(losses[0], losses[-1])
"""

CGN = """
from types import SimpleNamespace
from cgn import CGNOptimizer

optimizer = CGNOptimizer(
    parameters, SimpleNamespace(savefield="ggn"), lr=1.0, damping=1e-2, tol=1e-2
)

def step(loss, outputs):
    # The GGN of the mean squared error is 2 / N JᵀJ, over all parameters.
    loss.backward(retain_graph=True)
    u = torch.zeros_like(outputs, requires_grad=True)
    JTu = torch.autograd.grad(outputs, parameters, u, create_graph=True)
    JTu = torch.cat([block.flatten() for block in JTu])

    def ggn(vectors):
        rows = []
        for v in vectors:
            (Jv,) = torch.autograd.grad(JTu, u, v, retain_graph=True)
            rows.append(torch.autograd.grad(outputs, parameters, Jv, retain_graph=True))
        return torch.stack([torch.cat([p.flatten() for p in row]) for row in rows]) * 2 / 64

    ggn.parameters = parameters
    for p in parameters:
        p.ggn = ggn
    optimizer.step()
"""

CURVATURE = """
from curvature import GGN

curvature = GGN([parameters])

def step(loss, outputs):
    # The whole matrix, as the products with all unit vectors, and a direct solve.
    (product,) = curvature.backward(loss, outputs)
    n = sum(p.numel() for p in parameters)
    g = torch.cat([p.grad.flatten() for p in parameters])
    x = torch.nn.utils.parameters_to_vector(parameters).detach()
    x -= torch.linalg.solve(product(torch.eye(n)) + 1e-2 * torch.eye(n), g)
    torch.nn.utils.vector_to_parameters(x, parameters)
"""

BOTH = """
from cgn import CGNOptimizer
from curvature import GGN

curvature = GGN([parameters])
optimizer = CGNOptimizer(parameters, curvature, lr=1.0, damping=1e-2, tol=1e-2)

def step(loss, outputs):
    curvature.backward(loss, outputs)
    optimizer.step()
"""


def assert_trains(script: str, folder: Path, *files: str) -> None:
    """Assert that a user's script trains a network with nothing but copies of these files."""
    for name in files:
        (folder / name).write_bytes((PACKAGE / name).read_bytes())
    run = subprocess.run(
        [sys.executable, "-I", "-c", SETTING + script + TRAINING, str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    first, last = map(float, run.stdout.split())
    assert last < first / 10


def test_the_optimizer_alone_trains_a_network(tmp_path):
    assert_trains(CGN, tmp_path, "cgn.py")


def test_the_curvature_alone_trains_a_network(tmp_path):
    assert_trains(CURVATURE, tmp_path, "curvature.py")


def test_both_files_train_a_network(tmp_path):
    assert_trains(BOTH, tmp_path, "cgn.py", "curvature.py")
