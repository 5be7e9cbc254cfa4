"""Matrix-free second-order optimization in PyTorch."""

from cgn_tutorial.cgn import BlockSolve, CGNOptimizer, CGResult, LevenbergMarquardt, Solve, cg
from cgn_tutorial.curvature import GGN, BlockProduct, Curvature, Hessian, layers
from cgn_tutorial.data import load_mnist, load_published_run, mnist_loader
from cgn_tutorial.models import make_autoencoder, make_model
from cgn_tutorial.training import History, accuracy, default_device, train

__all__ = [
    "GGN",
    "BlockProduct",
    "BlockSolve",
    "CGNOptimizer",
    "CGResult",
    "Curvature",
    "Hessian",
    "History",
    "LevenbergMarquardt",
    "Solve",
    "accuracy",
    "cg",
    "default_device",
    "layers",
    "load_mnist",
    "load_published_run",
    "make_autoencoder",
    "make_model",
    "mnist_loader",
    "train",
]
