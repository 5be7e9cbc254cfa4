"""Preconditioners: approximate inverses of C + λI, so that CG needs few products, or just one.

`CGNOptimizer(..., preconditioner=P)` calls `P(block, lam)` once per block and step. `P` gets the
product with C, `[V, n] → [V, n]`, and the n numbers λ, and returns a function v ↦ M v for `cg`.
M must be symmetric, positive definite, and close to (C + λI)⁻¹. The solution does not depend on M;
the number of products does.

Which one? `cholesky`, an exact inverse, if the smaller of n and the number of residuals is at most
about a thousand; `Nystrom` beyond; none if a solve takes only a few products.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cgn_tutorial.cgn import Block

__all__ = ["Nystrom", "cholesky"]

Matvec = Callable[[Tensor], Tensor]

# What is below this many roundings of the largest number in C is lost when a matrix is factorized.
ROUNDINGS = 100


def cholesky(block: Block, lam: Tensor) -> Matvec:
    """The exact inverse of C + λI, by a Cholesky factorization.

    The function needs C as a matrix: n products with the columns of I, or, if the product has a
    `root` J with C = JᵀJ, one matrix product. If J has fewer rows than columns, the function
    factorizes the smaller of two matrices, by the identity of Woodbury,

        (JᵀJ + λI)⁻¹ v = (v − Jᵀ (JJᵀ + λI)⁻¹ J v) / λ.

    CG then corrects what the factorization loses by rounding. Memory and time grow as s² and s³,
    with s the smaller of the numbers of rows and columns.

    Args:
        block: The product with C, see `CGNOptimizer`.
        lam: The n numbers λ.

    Returns:
        The function v ↦ (C + λI)⁻¹ v.

    Raises:
        ValueError: C + λI is not positive definite.
    """
    J = getattr(block.product, "root", None)
    if J is not None and len(J) < J.shape[1]:
        lam = _safe(lam, J.square().sum(1))
        scaled = J / lam
        factor = _factor(torch.eye(len(J)).to(J) + scaled @ J.T)
        return lambda v: (v - J.T @ _solve(factor, scaled @ v)) / lam
    C = block(torch.eye(len(lam)).to(lam)) if J is None else J.T @ J
    factor = _factor(C + torch.diag(_safe(lam, C.diagonal())))
    return lambda v: _solve(factor, v)


class Nystrom:
    """A preconditioner from a randomized low-rank approximation of C.

    With an orthonormal n × r matrix Ω of random columns, the Nyström approximation of a positive
    semi-definite C is

        Ĉ = (CΩ) (ΩᵀCΩ)⁻¹ (CΩ)ᵀ = U S Uᵀ,        S = diag(s_1 ≥ … ≥ s_r).

    The preconditioner treats the r directions U by their s_i, and all other directions alike:

        M = U diag((s_r + λ) / (s_i + λ)) Uᵀ + (I − U Uᵀ).

    If the eigenvalues of C fall fast, M brings all eigenvalues of M (C + λI) near s_r + λ. An
    approximation costs r products, at once, and serves `every` steps; λ may change in between.

    Args:
        rank: r, at most n; more is cut to n.
        every: The number of steps that an approximation serves.
        seed: Seeds Ω. The same seed gives the same Ω on every process.

    Raises:
        ValueError: `rank` or `every` is not an integer of at least 1.

    Note:
        If λ differs within a block, M uses the mean. C must be positive semi-definite, as a GGN is.
        Approximations are no part of the optimizer's `state_dict`: to repeat a run from a
        checkpoint to the last digit, take `every=1`. Half precision has no factorizations in torch:
        train in float32 or float64.

    Source:
        Frangella, Tropp and Udell, "Randomized Nyström preconditioning" (2023); for networks that
        solve differential equations: Rathore et al., "Challenges in training PINNs" (2024).
    """

    def __init__(self, rank: int = 50, every: int = 10, seed: int = 0) -> None:
        for name, value in (("rank", rank), ("every", every)):
            if not hasattr(value, "__index__") or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, but is {value!r}.")
        self.rank = rank
        self.every = every
        self.seed = seed
        self._tests: dict[int, Tensor] = {}  # Ω, for each n
        # For the first parameter of each block: the number of steps served, U and S.
        self._approximations: dict[Tensor, tuple[int, Tensor, Tensor]] = {}

    def __repr__(self) -> str:
        """The constructor's call, by which `whole_batch` compares the processes."""
        return f"Nystrom(rank={self.rank}, every={self.every}, seed={self.seed})"

    def __call__(self, block: Block, lam: Tensor) -> Matvec:
        """The function v ↦ M v, with an approximation of this step or an earlier one.

        Raises:
            ValueError: C is not positive semi-definite.
        """
        key = block.parameters[0]
        age, U, S = self._approximations.get(key, (self.every, lam, lam))
        if age >= self.every or (len(U), U.dtype, U.device) != (len(lam), lam.dtype, lam.device):
            age, (U, S) = 0, self._approximate(block, lam)
        self._approximations[key] = age + 1, U, S
        # Below this λ, rounding would cost M its positive definiteness.
        rounding = torch.finfo(lam.dtype)
        mean = lam.mean() + ROUNDINGS * rounding.eps * S[0] + rounding.tiny
        weights = (S[-1] + mean) / (S + mean) - 1
        return lambda v: v + U @ (weights * (U.T @ v))

    def _approximate(self, block: Block, lam: Tensor) -> tuple[Tensor, Tensor]:
        """U and S of the Nyström approximation."""
        n = len(lam)
        if n not in self._tests:  # drawn on the CPU, so that Ω does not depend on the device
            random = torch.Generator().manual_seed(self.seed)
            columns = torch.randn(n, min(self.rank, n), generator=random, dtype=torch.float64)
            self._tests[n] = torch.linalg.qr(columns)[0]
        omega = self._tests[n].to(lam)
        Y = block(omega.T.contiguous()).T
        w, W = torch.linalg.eigh(omega.T @ Y)
        if w[0] < -(torch.finfo(lam.dtype).eps ** 0.5) * w[-1].abs():
            raise ValueError(
                "C is not positive semi-definite: take a GGN, or a solve without a preconditioner."
            )
        # Eigenvalues that are rounding alone count as zero: C has a smaller rank than Ω.
        kept = w > ROUNDINGS * torch.finfo(lam.dtype).eps * w[-1]
        B = Y @ (W * torch.where(kept, w.clamp(min=0).rsqrt(), 0))
        U, root, _ = torch.linalg.svd(B, full_matrices=False)
        return U, root.square()


def _safe(lam: Tensor, diagonal: Tensor) -> Tensor:
    """λ, raised to what the rounding of a matrix with this diagonal allows."""
    rounding = torch.finfo(lam.dtype)
    least: Tensor = ROUNDINGS * rounding.eps * diagonal.abs().amax() + rounding.tiny**0.5
    return lam + least


def _factor(A: Tensor) -> Tensor:
    """The Cholesky factor of A."""
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(A)
    if failed:
        raise ValueError(
            "C + λI is not positive definite: raise the damping, take a GGN, or solve without a "
            "preconditioner."
        )
    return factor


def _solve(factor: Tensor, v: Tensor) -> Tensor:
    """The solution x of L Lᵀ x = v."""
    return torch.cholesky_solve(v[:, None], factor)[:, 0]
