"""A regression on a table of numbers, with Accelerate: with products by autograd."""

import math

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

from cgn_tutorial import GGN, CGNOptimizer, layers


def make_table(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ten columns, of which five count: Friedman's function, with a little noise."""
    x = torch.rand(rows, 10)
    y = 10 * (math.pi * x[:, 0] * x[:, 1]).sin() + 20 * (x[:, 2] - 0.5) ** 2
    y = y + 10 * x[:, 3] + 5 * x[:, 4] + torch.randn(rows)
    return x - 0.5, ((y - 14.4) / 5)[:, None]


def train(lr: float = 0.3, steps: int = 100, seed: int = 0) -> float:
    """Train, and return the loss on other rows."""
    torch.manual_seed(seed)
    inputs, targets = make_table(4000)
    model = nn.Sequential(
        nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
    )
    curvature = GGN(layers(model))
    optimizer = CGNOptimizer(
        model.parameters(), curvature, lr=lr, damping=1e-2, tol=0.3, maxiter=10
    )
    batches = [(inputs[batch], targets[batch]) for batch in torch.randint(2000, (steps, 256))]
    accelerator = Accelerator()
    model, optimizer, loader = accelerator.prepare(
        model, optimizer, DataLoader(batches, batch_size=None)
    )
    for x, y in loader:
        optimizer.zero_grad()
        outputs = model(x)
        loss = mse_loss(outputs, y)
        curvature.backward(loss, outputs)
        optimizer.step()
    x, y = inputs[2000:].to(accelerator.device), targets[2000:].to(accelerator.device)
    with torch.no_grad():
        return mse_loss(model(x), y).item()
