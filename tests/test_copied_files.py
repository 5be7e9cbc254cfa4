"""The files to copy work away from the package, each alone and both together."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import cgn_tutorial

PACKAGE = Path(cgn_tutorial.__file__).parent

SETTING = """
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


#: A user's scripts, and the files that each has beside it.
SCRIPTS = {
    "the optimizer alone": (CGN, ["cgn.py"]),
    "the curvature alone": (CURVATURE, ["curvature.py"]),
    "both": (BOTH, ["cgn.py", "curvature.py"]),
}

RUN = """
import contextlib, io, json, sys, traceback
sys.modules |= {"cgn_tutorial": None, "backpack": None}  # importing them fails
scripts, said = json.load(sys.stdin), {}
for name, (folder, script) in scripts.items():
    sys.path.insert(0, folder)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        try:
            exec(script, {})
        except Exception:
            traceback.print_exc(file=output)
    said[name] = output.getvalue()
    sys.path.remove(folder)
    for module in ("cgn", "curvature"):
        sys.modules.pop(module, None)
json.dump(said, sys.stdout)
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each script prints in a folder with nothing but copies of its files.

    One process runs the scripts in turn, since to import torch takes longer than to run them.
    """
    scripts = {}
    for name, (script, files) in SCRIPTS.items():
        folder = tmp_path_factory.mktemp("copies")
        for file in files:
            (folder / file).write_bytes((PACKAGE / file).read_bytes())
        scripts[name] = str(folder), SETTING + script + TRAINING
    run = subprocess.run(
        [sys.executable, "-I", "-c", RUN],
        input=json.dumps(scripts),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize("name", SCRIPTS)
def test_copies_of_the_files_train_a_network(said: dict[str, str], name: str) -> None:
    try:
        first, last = map(float, said[name].split())
    except ValueError:
        pytest.fail(said[name])
    assert last < first / 10
