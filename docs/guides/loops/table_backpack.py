"""A regression on a table of numbers: with products by BackPACK."""

import math

import torch
from backpack import backpack, extend
from backpack.extensions import GGNMP
from torch import nn
from torch.nn.functional import mse_loss

from cgn_tutorial import CGNOptimizer


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
    model, loss_function = extend(model), extend(nn.MSELoss())
    options = {"damping": 1e-2, "tol": 0.3, "maxiter": 10}
    optimizer = CGNOptimizer(model.parameters(), GGNMP(), lr=lr, **options)
    for _ in range(steps):
        batch = torch.randint(2000, (256,))
        optimizer.zero_grad()
        outputs = model(inputs[batch])
        loss = loss_function(outputs, targets[batch])
        with backpack(optimizer.bp_extension):
            loss.backward()
        optimizer.step()
    with torch.no_grad():
        return mse_loss(model(inputs[2000:]), targets[2000:]).item()
