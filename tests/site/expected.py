"""What the figures that a reader moves must show, computed with the package: for `test_explore.py`.

`nox -s docs` runs this, for the browser's environment has no torch.
"""

import json
import sys
from pathlib import Path

import torch
from torch.func import grad

from cgn_tutorial import cg

#: Two moves of the arrow keys from (0, 0), and the corners of the picture.
STARTS = [(0.1, 0.0), (0.1, 0.1), *((x, y) for x in (-0.42, 2.78) for y in (-0.79, 2.41))]


def two_digits(number):
    return float(f"{number:.1e}")


def parabola():
    """The damped step from 1.5, for each position of the slider."""

    def loss(x):
        return 1 - torch.exp(-(x**2) / 2)

    x = torch.tensor(1.5)
    g, C = grad(loss)(x), grad(grad(loss))(x)
    shown = {}
    for lam in (i / 100 for i in range(201)):
        v = cg(
            lambda v, lam=lam: (C + lam) * v, -g, negative_curvature="ignore", tol=0, maxiter=1
        ).x
        shown[f"{lam:.2f}"] = {"v": v.item(), "end": (x + v).item(), "after": loss(x + v).item()}
    return shown


def valley():
    """The damped step from (10, 1), for each position of the slider."""
    C, start = torch.tensor([1.0, 20.0]).diag(), torch.tensor([10.0, 1.0])
    shown = {}
    for lam in (two_digits(10 ** (i / 20)) for i in range(-60, 81)):
        v = torch.linalg.solve(C + lam * torch.eye(2), -C @ start)
        end = start + v
        shown[f"{lam:g}"] = {
            "v": v.tolist(),
            "end": end.tolist(),
            "after": (end @ C @ end / 2).item(),
        }
    return shown


def paths(kappa, x0, steps=20):
    """Both paths from x0, on the quadratic of page 2 with another condition number."""
    A, b = torch.tensor([[2, -1.8], [-1.8, 2.5]]).float(), torch.tensor([0.9, -0.1]).float()
    A, b = A.double(), b.double()  # as page 2 writes them, in single precision first
    solution = torch.linalg.solve(A, b)
    Q = torch.linalg.eigh(A).eigenvectors
    A = Q @ torch.tensor([1.0, kappa]).diag() @ Q.T
    b, x0 = A @ solution, torch.tensor(x0)
    conjugate, descent = [x0], [x0]
    result = cg(A.mv, b, x0, tol=1e-12, atol=0, callback=conjugate.append)
    for _ in range(steps):  # conjugate gradients that start afresh at every step
        descent.append(cg(A.mv, b, descent[-1], tol=1e-12, atol=0, maxiter=1).x)
    return {
        "conjugate": torch.stack(conjugate).tolist(),
        "descent": torch.stack(descent).tolist(),
        "products": result.products - 1,  # one is for the residual at x0
    }


def numbers():
    return {
        "parabola": parabola(),
        "valley": valley(),
        "paths by kappa": {
            f"{kappa:g}": paths(kappa, (0.0, 0.0))
            for kappa in (two_digits(10 ** (i / 20)) for i in range(41))
        },
        "paths by start": {f"{x:.2f},{y:.2f}": paths(10, (x, y)) for x, y in STARTS},
    }


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)  # as in browsers
    Path(sys.argv[1]).write_text(json.dumps(numbers()))
