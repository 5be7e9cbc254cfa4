"""Fit the table of the guides with any settings: for the symptoms, and for the diagnostics."""

import runpy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import mse_loss

from cgn_tutorial import GGN, CGNOptimizer, Solve, layers

make_table = runpy.run_path(str(Path(__file__).parent / "loops" / "table.py"))["make_table"]


def fit(
    seed: int, *, steps: int = 30, batch: int = 256, fall: bool = False, **options: Any
) -> tuple[list[float], list[dict[tuple[str, ...], Solve]]]:
    """The loss on all rows before and after each step, and the solves of each step, by block.

    With `fall`, the step size falls to zero.
    """
    torch.manual_seed(seed)
    inputs, targets = make_table(2000)
    model = nn.Sequential(
        nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
    )
    curvature = GGN(layers(model))
    options = {"lr": 0.3, "damping": 1e-2, "tol": 0.3, "maxiter": 10} | options
    optimizer = CGNOptimizer(model.parameters(), curvature, **options)
    losses, solves = [mse_loss(model(inputs), targets).item()], []
    for i in range(steps):
        if fall:
            optimizer.param_groups[0]["lr"] = options["lr"] * (1 - i / steps)
        rows = torch.randint(2000, (batch,))
        optimizer.zero_grad()
        outputs = model(inputs[rows])
        curvature.backward(mse_loss(outputs, targets[rows]), outputs)
        optimizer.step()
        solves.append(optimizer.solves)
        with torch.no_grad():
            losses.append(mse_loss(model(inputs), targets).item())
    return losses, solves
