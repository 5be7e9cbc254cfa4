"""A language model on characters: with products by autograd."""

import argparse
import inspect

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from cgn_tutorial import GGN, CGNOptimizer, layers

TEXT = inspect.getsource(argparse)
LETTERS = sorted(set(TEXT))
CODES = torch.tensor([LETTERS.index(letter) for letter in TEXT])


class Model(nn.Module):
    """Scores of the next character, after each of a text."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(LETTERS), 16)
        self.recurrent = nn.GRU(16, 32, batch_first=True)
        self.head = nn.Linear(32, len(LETTERS))

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        """`[texts, characters]` to `[texts, scores, characters]`."""
        states, _ = self.recurrent(self.embedding(codes))
        return self.head(states).transpose(1, 2)


def train(lr: float = 0.3, steps: int = 40, seed: int = 0) -> float:
    """Train, and return the loss on another part of the text."""
    torch.manual_seed(seed)
    model = Model()
    curvature = GGN(layers(model))
    optimizer = CGNOptimizer(model.parameters(), curvature, lr=lr, damping=1e-2, tol=0.3, maxiter=5)
    for _ in range(steps):
        starts = torch.randint(len(CODES) - 20_000, (32, 1))
        texts = CODES[starts + torch.arange(25)]
        optimizer.zero_grad()
        outputs = model(texts[:, :-1])
        loss = cross_entropy(outputs, texts[:, 1:])
        curvature.backward(loss, outputs)
        optimizer.step()
    with torch.no_grad():
        texts = CODES[-5000:].view(200, 25)
        return cross_entropy(model(texts[:, :-1]), texts[:, 1:]).item()
