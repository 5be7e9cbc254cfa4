"""Least squares with the Jacobian in memory: products that cost two small matrix products.

For a loss ½‖r(θ)‖², the generalized Gauss–Newton matrix is JᵀJ, with the rows of J = ∂r/∂θ. A
product through the graph of the loss costs about as much as a gradient, however small the network.
If the residual of one sample is a function, `torch.func` computes all rows of J at once: for the
small networks of the tutorial, in the time of two to six gradients. After that, products,
preconditioners and exact solves need no graph.

J has N × n numbers for N residuals and n parameters. J pays if N × n numbers fit in memory and a
step takes more than a few products, as in least squares to many digits. For N × n beyond that, use
`cgn_tutorial.curvature.GGN`, whose memory does not grow with N × n.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from cgn_tutorial.curvature import Curvature

__all__ = ["JacobianGGN", "JacobianProduct"]

Residual = Callable[..., Tensor]  # (model, *sample) ↦ the residual of one sample
Term = tuple[Any, ...]  # a Residual, and the tensors whose rows are its samples


@dataclass(frozen=True, eq=False)
class JacobianProduct:
    """The product with a block JᵀJ of the curvature, `[V, n] → [V, n]`, from a stored J.

    The product has no graph: the product stays valid if parameters change.

    Attributes:
        parameters: The parameters of the block.
        root: J, with shape `[N, n]`, a row for each residual.
    """

    parameters: tuple[Tensor, ...]
    root: Tensor

    def __call__(self, v: Tensor) -> Tensor:
        """Multiply each of the V rows of v.

        Raises:
            ValueError: v does not have shape `[V, n]`.
        """
        if v.ndim != 2 or v.shape[1] != self.root.shape[1]:
            raise ValueError(
                f"v must have shape [V, {self.root.shape[1]}], but has {list(v.shape)}."
            )
        return (v @ self.root.T) @ self.root


class JacobianGGN(Curvature):
    """The curvature JᵀJ of least squares, from all rows of J, in diagonal blocks.

    The loss is a sum over terms t with functions r_t and N_t samples,

        L(θ) = ½ Σ_t 1/N_t Σ_i ‖r_t(θ, x_ti)‖² = ½ ‖r‖²,

    where r holds all residuals, those of term t divided by √N_t. The gradient is Jᵀr. JᵀJ is the
    generalized Gauss–Newton matrix with the residuals as outputs. To weight a term, scale its r_t.

    Args:
        model: The module that the residuals evaluate. No sample may change how the model treats
            another sample, as BatchNorm in train mode does.
        blocks: The parameters of each diagonal block, as for `GGN`: `[model.parameters()]` for the
            whole matrix.
        chunk_size: How many samples to differentiate at a time; `None` means all. Fewer samples
            take less memory and more time.

    Raises:
        TypeError: A block contains something other than real tensors.
        ValueError: There are no blocks, a block is empty, blocks overlap, or a block contains a
            tensor that is no parameter of the model.

    Example:
        >>> from cgn_tutorial import CGNOptimizer, LevenbergMarquardt, cholesky
        >>> model = nn.Sequential(nn.Linear(1, 10), nn.Tanh(), nn.Linear(10, 1)).double()
        >>> curvature = JacobianGGN(model, [model.parameters()])
        >>> optimizer = CGNOptimizer(
        ...     model.parameters(), curvature, lr=1.0, tol=1e-6, atol=0.0, preconditioner=cholesky
        ... )
        >>> adaptive = LevenbergMarquardt(optimizer, minimum=1e-14, rule="nielsen")
        >>> x = torch.linspace(-1, 1, 50, dtype=torch.float64)[:, None]
        >>> def residual(model, x, y):
        ...     return model(x) - y
        >>> fit = residual, x, torch.sin(3 * x)
        >>> for _ in range(10):
        ...     optimizer.zero_grad()
        ...     loss = curvature.backward(fit)
        ...     rho = adaptive.step(loss, lambda: curvature.loss(fit))

    Source:
        Levenberg (1944) and Marquardt (1963), as in every solver for nonlinear least squares; rows
        of J by vectorized reverse differentiation, `torch.func`.
    """

    savefield = "jacobian_product"

    def __init__(
        self,
        model: nn.Module,
        blocks: Iterable[Tensor | Iterable[Tensor]],
        chunk_size: int | None = None,
    ) -> None:
        super().__init__(blocks)
        names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
        for i, block in enumerate(self.blocks):
            for p in block:
                if p not in names:
                    raise ValueError(
                        f"Block {i} contains a tensor of shape {list(p.shape)} that is no "
                        "parameter of the model."
                    )
        self.model = model
        self.chunk_size = chunk_size
        self._names = names
        self._evaluate = _Evaluate(model)

    def loss(self, *terms: Term) -> Tensor:
        """The loss ½‖r‖², without gradients.

        Args:
            terms: For each term, `(residual, *samples)`, see `backward`.

        Raises:
            TypeError, ValueError: As `backward`.
        """
        with torch.no_grad():
            values = [self._values(*term) for term in _checked(terms)]
            return torch.stack([r.square().sum() / (2 * len(r)) for r in values]).sum()

    def backward(self, *terms: Term) -> Tensor:  # type: ignore[override]
        """Compute all rows of J, add the gradient to `.grad`, and leave the products.

        Hooks of parameters act on the gradient, as in `loss.backward()`, and not on J. Frozen
        parameters get no product: their blocks shrink. The products are valid until the next
        backward pass, even if a step is taken back.

        Args:
            terms: For each term, `(residual, *samples)`. `residual(model, *sample)` computes the
                residual of one sample, a tensor of any shape, in the dtype of the parameters.
                `samples` are tensors with N_t rows each. `model` is the module itself, while its
                parameters stand for what is differentiated.

        Returns:
            The loss ½‖r‖², without a graph.

        Raises:
            TypeError: A term is not a function followed by tensors.
            ValueError: There are no terms, or the samples of a term disagree in length, or are
                empty; or every parameter of the blocks is frozen.
        """
        blocks = [tuple(p for p in block if p.requires_grad) for block in self.blocks]
        members = [p for block in blocks for p in block]
        if not members:
            raise ValueError("All parameters of the blocks are frozen: there is nothing to train.")
        r, J = self._jacobian(members, _checked(terms))
        for p in (p for block in self.blocks for p in block if hasattr(p, self.savefield)):
            delattr(p, self.savefield)
        gradients = (r @ J).split([p.numel() for p in members])
        torch.autograd.backward(
            members, [g.view_as(p).to(p.dtype) for g, p in zip(gradients, members, strict=True)]
        )
        columns = J.split([sum(p.numel() for p in block) for block in blocks], dim=1)
        for block, root in zip(blocks, columns, strict=True):
            product = JacobianProduct(block, root)
            for p in block:
                setattr(p, self.savefield, product)
        return r.square().sum() / 2

    def _values(self, residual: Residual, *samples: Tensor) -> Tensor:
        """The residuals of all samples, `[N_t, …]`."""
        evaluate = partial(self._at, {}, residual)
        return vmap(evaluate, chunk_size=self.chunk_size)(*samples)

    def _at(self, trained: dict[str, Tensor], residual: Residual, *sample: Tensor) -> Tensor:
        """The residual of a sample with these parameters. What the model assigns is undone."""
        names = {f"model.{name}": p for name, p in trained.items()}
        names |= {f"model.{name}": b for name, b in self.model.named_buffers()}
        result: Tensor = functional_call(self._evaluate, names, (residual, *sample))
        return result

    @torch.no_grad()
    def _jacobian(self, members: list[Tensor], terms: tuple[Term, ...]) -> tuple[Tensor, Tensor]:
        """The residuals r, `[N]`, and their derivatives J by the members, `[N, n]`."""
        trained = {self._names[p]: p.detach() for p in members}
        parts = [self._derivatives(trained, *term) for term in terms]
        r = torch.cat([r.reshape(-1) for _, r in parts])
        # Each number is copied once: J may be the largest tensor of all.
        J = r.new_empty(len(r), sum(p.numel() for p in members))
        rows = J.split([r.numel() for _, r in parts])
        for (derivatives, _), some in zip(parts, rows, strict=True):
            columns = some.split([p.numel() for p in members], dim=1)
            for name, column in zip(trained, columns, strict=True):
                column.copy_(derivatives[name].reshape(column.shape))
        return r, J

    def _derivatives(
        self, trained: dict[str, Tensor], residual: Residual, *samples: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The residuals of a term over √N_t, `[N_t, K]`, and their derivatives."""
        root = len(samples[0]) ** 0.5

        def scaled(theta: dict[str, Tensor], *sample: Tensor) -> tuple[Tensor, Tensor]:
            r = self._at(theta, residual, *sample).reshape(-1) / root
            return r, r

        in_dims = (None, *[0] * len(samples))
        every = vmap(jacrev(scaled, has_aux=True), in_dims, chunk_size=self.chunk_size)
        derivatives, r = every(trained, *samples)
        return derivatives, r


class _Evaluate(nn.Module):
    """Calls a residual with the model, so that `functional_call` reaches the model's parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, residual: Residual, *sample: Tensor) -> Tensor:
        return residual(self.model, *sample)


def _checked(terms: tuple[Term, ...]) -> tuple[Term, ...]:
    """The terms. Raise unless each is a function and tensors of the same, positive length."""
    if not terms:
        raise ValueError("There are no terms: pass (residual, *samples), once or several times.")
    for i, term in enumerate(terms):
        if not isinstance(term, tuple) or not callable(term[0]):
            raise TypeError(f"Term {i} must be a tuple (residual, *samples), not {term!r:.60}.")
        lengths = []
        for x in term[1:]:
            if not isinstance(x, Tensor) or not x.ndim:
                raise TypeError(
                    f"The samples of term {i} must be tensors with rows, not {x!r:.60}."
                )
            lengths.append(len(x))
        if not lengths or len(set(lengths)) > 1 or not lengths[0]:
            raise ValueError(
                f"The samples of term {i} must have the same number of rows, at least one, but "
                f"have {lengths}."
            )
    return terms
