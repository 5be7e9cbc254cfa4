"""What the figures that a reader moves must show, computed with the package: for `test_explore.py`.

`nox -s docs` runs this, for the browser's environment has no torch.
"""

import json
import sys
from pathlib import Path

import torch

from cgn_tutorial import CGNOptimizer, Hessian, cg

#: Two moves of the arrow keys from (0, 0), and the corners of the picture.
STARTS = [(0.1, 0.0), (0.1, 0.1), *((x, y) for x in (-0.42, 2.78) for y in (-0.79, 2.41))]


def two_digits(number):
    return float(f"{number:.1e}")


def damped_step(loss, start, lam, gamma):
    """One step of the optimizer from the start: the Newton step v, its end, and the loss there."""

    def end(lr):
        x = torch.nn.Parameter(torch.tensor(start))
        curvature = Hessian([[x]])
        options = {"damping": lam, "negative_curvature": "ignore", "tol": 0, "atol": 0}
        optimizer = CGNOptimizer([x], curvature, lr=lr, maxiter=x.numel(), **options)
        curvature.backward(loss(x), ())
        optimizer.step()
        return x.detach()

    x = end(gamma)
    v = end(1.0) - torch.tensor(start)
    return {"v": v.tolist(), "end": x.tolist(), "after": loss(x).item()}


def along_each_slider(opening, sweeps):
    """The settings with one slider moved through its positions, the others as at the opening."""
    return [opening | {name: value} for name, values in sweeps.items() for value in values]


def parabola():
    """The damped step on the valley with which page 1 begins, for each position of each slider."""

    def loss(x):
        return -torch.expm1(-(x**2) / 2)

    positions = along_each_slider(
        {"x": 1.5, "lambda": 0.8, "gamma": 1.0},
        {
            "x": [i / 20 for i in range(-50, 51)],
            "lambda": [i / 100 for i in range(201)],
            "gamma": [i / 20 for i in range(31)],
        },
    )
    return {
        " ".join(f"{value:.2f}" for value in at.values()): damped_step(
            loss, at["x"], at["lambda"], at["gamma"]
        )
        for at in positions
    }


def valley():
    """The damped step from (10, 1) on the long valley, for each position of each slider."""
    C = torch.tensor([1.0, 20.0]).diag()
    positions = along_each_slider(
        {"lambda": 1.0, "gamma": 1.0},
        {
            "lambda": [two_digits(10 ** (i / 20)) for i in range(-60, 81)],
            "gamma": [i / 20 for i in range(25)],
        },
    )
    return {
        f"{at['lambda']:g} {at['gamma']:.2f}": damped_step(
            lambda x: x @ C @ x / 2, [10.0, 1.0], at["lambda"], at["gamma"]
        )
        for at in positions
    }


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
