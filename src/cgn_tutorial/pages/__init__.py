"""What only the tutorial's pages share: MNIST, networks, the training loop, races and figures."""

from cgn_tutorial.pages.data import load_mnist, load_published_run, mnist_loader
from cgn_tutorial.pages.models import make_autoencoder, make_model
from cgn_tutorial.pages.training import History, accuracy, default_device, train

__all__ = [
    "History",
    "accuracy",
    "default_device",
    "load_mnist",
    "load_published_run",
    "make_autoencoder",
    "make_model",
    "mnist_loader",
    "train",
]
