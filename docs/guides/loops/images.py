"""A classifier of images, with parameter groups and a schedule: the loop as many have it."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from cgn_tutorial.pages import load_mnist


def train(lr: float, steps: int = 40, seed: int = 0) -> float:
    """Train, and return the loss on 2,000 of the training images."""
    torch.manual_seed(seed)
    images, labels = load_mnist().tensors
    model = nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 5 * 5, 10),
    )
    weights = [p for p in model.parameters() if p.dim() > 1]
    biases = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": weights, "weight_decay": 1e-4}, {"params": biases}]
    optimizer = torch.optim.SGD(groups, lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
    for _ in range(steps):
        batch = torch.randint(len(images), (128,))
        optimizer.zero_grad()
        outputs = model(images[batch])
        loss = cross_entropy(outputs, labels[batch])
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return cross_entropy(model(images[:2000]), labels[:2000]).item()
