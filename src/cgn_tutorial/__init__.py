"""Matrix-free second-order optimization in PyTorch."""

from cgn_tutorial.cgn import BlockSolve, CGNOptimizer, CGResult, LevenbergMarquardt, Solve, cg
from cgn_tutorial.curvature import (
    GGN,
    BlockProduct,
    Curvature,
    Hessian,
    check_products,
    layers,
    restrict,
)

__all__ = [
    "GGN",
    "BlockProduct",
    "BlockSolve",
    "CGNOptimizer",
    "CGResult",
    "Curvature",
    "Hessian",
    "LevenbergMarquardt",
    "Solve",
    "cg",
    "check_products",
    "layers",
    "restrict",
]
