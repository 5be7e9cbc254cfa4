"""Matrix-free second-order optimization in PyTorch."""

from cgn_tutorial.cgn import Block, CGNOptimizer, CGResult, Solve, cg
from cgn_tutorial.curvature import (
    GGN,
    BlockProduct,
    Curvature,
    Extension,
    Hessian,
    Product,
    check_products,
    layers,
    restrict,
)
from cgn_tutorial.damping import LevenbergMarquardt
from cgn_tutorial.jacobian import JacobianGGN, JacobianProduct
from cgn_tutorial.parallel import Share, whole_batch
from cgn_tutorial.preconditioner import Nystrom, cholesky

__all__ = [
    "GGN",
    "Block",
    "BlockProduct",
    "CGNOptimizer",
    "CGResult",
    "Curvature",
    "Extension",
    "Hessian",
    "JacobianGGN",
    "JacobianProduct",
    "LevenbergMarquardt",
    "Nystrom",
    "Product",
    "Share",
    "Solve",
    "cg",
    "check_products",
    "cholesky",
    "layers",
    "restrict",
    "whole_batch",
]
