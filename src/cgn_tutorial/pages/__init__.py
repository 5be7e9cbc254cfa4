"""What only the tutorial's pages share: MNIST, networks, the training loop, races and figures."""

from cgn_tutorial.pages.data import (
    load_mnist,
    load_published_run,
    load_tiny_mnist,
    mnist_loader,
)
from cgn_tutorial.pages.models import (
    make_autoencoder,
    make_model,
    make_tiny_model,
    outputs_of,
    split,
)
from cgn_tutorial.pages.training import History, accuracy, default_device, train

__all__ = [
    "History",
    "accuracy",
    "default_device",
    "load_mnist",
    "load_published_run",
    "load_tiny_mnist",
    "make_autoencoder",
    "make_model",
    "make_tiny_model",
    "mnist_loader",
    "outputs_of",
    "split",
    "train",
]
