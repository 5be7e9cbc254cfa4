"""A regression on a table of numbers, in Lightning: the module as many have it."""

import math

import lightning
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader


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
        self.lr = lr
        self.model = nn.Sequential(
            nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
        )

    def training_step(self, batch):
        """The loss of a batch."""
        inputs, targets = batch
        outputs = self.model(inputs)
        return mse_loss(outputs, targets)

    def configure_optimizers(self):
        """The optimizer."""
        return torch.optim.SGD(self.model.parameters(), lr=self.lr)


def train(lr: float, steps: int = 100, seed: int = 0) -> float:
    """Train, and return the loss on other rows."""
    torch.manual_seed(seed)
    inputs, targets = make_table(4000)
    regression = Regression(lr)
    batches = [(inputs[batch], targets[batch]) for batch in torch.randint(2000, (steps, 256))]
    trainer = lightning.Trainer(max_epochs=1, logger=False, enable_checkpointing=False)
    trainer.fit(regression, DataLoader(batches, batch_size=None))
    with torch.no_grad():
        return mse_loss(regression.model(inputs[2000:]), targets[2000:]).item()
