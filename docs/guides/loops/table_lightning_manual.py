"""A regression on a table of numbers, in Lightning: by manual optimization."""

import math

import lightning
import torch
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


class Regression(lightning.LightningModule):
    """A network, its loss and its optimizer."""

    def __init__(self, lr: float) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.lr = lr
        self.model = nn.Sequential(
            nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
        )
        self.curvature = GGN(layers(self.model))

    def training_step(self, batch):
        """A step on a batch."""
        inputs, targets = batch
        optimizer = self.optimizers()
        optimizer.zero_grad()
        outputs = self.model(inputs)
        loss = mse_loss(outputs, targets)
        self.curvature.backward(loss, outputs)  # in place of self.manual_backward(loss)
        optimizer.step()

    def configure_optimizers(self):
        """The optimizer."""
        return CGNOptimizer(
            self.model.parameters(), self.curvature, lr=self.lr, damping=1e-2, tol=0.3, maxiter=10
        )


def train(lr: float = 0.3, steps: int = 100, seed: int = 0) -> float:
    """Train, and return the loss on other rows."""
    torch.manual_seed(seed)
    inputs, targets = make_table(4000)
    regression = Regression(lr)
    batches = [(inputs[batch], targets[batch]) for batch in torch.randint(2000, (steps, 256))]
    trainer = lightning.Trainer(max_epochs=1, logger=False, enable_checkpointing=False)
    trainer.fit(regression, DataLoader(batches, batch_size=None))
    with torch.no_grad():
        return mse_loss(regression.model(inputs[2000:]), targets[2000:]).item()
