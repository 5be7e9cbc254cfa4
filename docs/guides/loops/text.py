"""A language model on characters: the loop as many have it."""

import argparse
import inspect

import torch
from torch import nn
from torch.nn.functional import cross_entropy

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


def train(lr: float, steps: int = 40, seed: int = 0) -> float:
    """Train, and return the loss on another part of the text."""
    torch.manual_seed(seed)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    for _ in range(steps):
        starts = torch.randint(len(CODES) - 20_000, (32, 1))
        texts = CODES[starts + torch.arange(25)]
        optimizer.zero_grad()
        outputs = model(texts[:, :-1])
        loss = cross_entropy(outputs, texts[:, 1:])
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        texts = CODES[-5000:].view(200, 25)
        return cross_entropy(model(texts[:, :-1]), texts[:, 1:]).item()
