"""Random linear systems for the property tests, and a count of waits for the device."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

#: How many systems the property tests have drawn so far.
drawn = 0

SHAPES = [(), (1,), (2,), (5,), (8,), (2, 3), (3, 1, 3), (2, 1, 2, 3)]
KINDS = ["definite", "semi-definite", "rank one", "indefinite", "negative definite", "zero"]
STARTS = [None, "random", "wild", "exact"]


@dataclass(frozen=True)
class System:
    """A symmetric system A x = b in float32 or float64, perhaps with a starting point."""

    matrix: Tensor
    b: Tensor
    x0: Tensor | None

    def A(self, v: Tensor) -> Tensor:
        """A v, for a tensor v of any shape."""
        return (self.matrix.to(v.dtype) @ v.reshape(-1)).view(v.shape)

    def residual(self, x: Tensor) -> float:
        """‖b − A x‖, to float64's precision."""
        return (self.b.double() - self.A(x.double())).norm().item()

    def value(self, x: Tensor) -> float:
        """½ xᵀAx − bᵀx, to float64's precision."""
        x = x.double()
        return (x * (self.A(x) / 2 - self.b.double())).sum().item()

    def model(self, x: Tensor) -> float:
        """½ xᵀAx − bᵀx less its value at the start, to float64's precision."""
        start = torch.zeros_like(x) if self.x0 is None else self.x0
        step = x.double() - start.double()
        r0 = self.b.double() - self.A(start.double())
        return (step * (self.A(step) / 2 - r0)).sum().item()

    def rounding(self, iterates: list[Tensor], roundings: float = 10) -> float:
        """Bound c k ε (‖A‖ max ‖x_k‖ + ‖b‖): what k iterations may lose of a residual."""
        largest = max(x.double().norm().item() for x in iterates)
        scale = torch.linalg.matrix_norm(self.matrix.double(), 2).item() * largest
        k = len(iterates) + math.sqrt(self.b.numel())  # iterations, and the sum in each product
        return (
            roundings * k * torch.finfo(self.b.dtype).eps * (scale + self.b.double().norm().item())
        )


@st.composite
def linear_systems(
    draw: st.DrawFn,
    kinds: list[str] = KINDS,
    starts: list[str | None] = STARTS,
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64),
    condition: float = 1e6,
    scales: tuple[float, ...] = (0.0, 1e-12, 1.0, 1e10),
) -> System:
    """Systems of all kinds; `scales` are those of b."""
    global drawn
    drawn += 1
    shape, kind = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(kinds))
    start, dtype = draw(st.sampled_from(starts)), draw(st.sampled_from(dtypes))
    decades = draw(st.floats(0, math.log10(condition)))
    scale = draw(st.sampled_from(scales))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random, dtype=torch.float64)

    n = math.prod(shape)
    eigenvalues = 10 ** torch.linspace(0, -decades, n, dtype=torch.float64)
    first = torch.arange(n) < (n + 1) // 2
    if kind == "zero":
        eigenvalues *= 0
    elif kind == "semi-definite":
        eigenvalues *= first
    elif kind == "rank one":
        eigenvalues[1:] = 0
    elif kind == "indefinite":
        eigenvalues *= 1 - 2.0 * first
    elif kind == "negative definite":
        eigenvalues *= -1
    Q = torch.linalg.qr(normal(n, n)).Q
    matrix = Q * eigenvalues @ Q.T
    solution = normal(n) * scale
    # Half of the right-hand sides are in the range of a singular A.
    b = matrix @ solution if start == "exact" or draw(st.booleans()) else normal(n) * scale
    x0 = {None: None, "random": normal(n), "wild": normal(n) * 1e10, "exact": solution}[start]
    return System(
        matrix.to(dtype),
        b.to(dtype).view(shape),
        None if x0 is None else x0.to(dtype).view(shape),
    )


CONVERSIONS = ["item", "tolist", "cpu", "numpy", "__array__"]
CONVERSIONS += ["__bool__", "__int__", "__index__", "__float__", "__complex__"]


@contextmanager
def counted_conversions() -> Iterator[list[str]]:
    """Record every conversion of a tensor to Python numbers; on a GPU, nothing else may wait."""
    calls: list[str] = []

    def recorded(name: str) -> object:
        original = getattr(Tensor, name)

        def conversion(self: Tensor, *args: object, **kwargs: object) -> object:
            calls.append(name)
            with _sync_debug_mode("default"):
                return original(self, *args, **kwargs)

        return conversion

    with pytest.MonkeyPatch.context() as patch, _sync_debug_mode("error"):
        for name in CONVERSIONS:
            patch.setattr(Tensor, name, recorded(name))
        yield calls


@contextmanager
def _sync_debug_mode(mode: str) -> Iterator[None]:
    """What CUDA does about operations that wait for the device; nothing without a GPU."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(action="ignore"):  # torch calls the mode a prototype
        torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
