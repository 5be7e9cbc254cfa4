"""Conjugate gradients, and a Newton optimizer built on them, in one file to copy.

Newton's method steps to the minimum of a local quadratic model. A step solves

    (C + λI) v = −g,        x ← x + γ v

with the gradient g, a curvature matrix C, the damping λ and the step size γ. C is far too large to
store. Conjugate gradients need only products of C with vectors. `cg` solves such a system, and
`CGNOptimizer` applies `cg` to the parameters of a network.

The file needs nothing but PyTorch. The optimizer reads gradients and curvature products from the
parameters: a backward pass leaves a gradient as `p.grad`, and a product as another attribute. Code
that changes the meaning of a step (averages over processes, a penalty) replaces these attributes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Block", "CGNOptimizer", "CGResult", "Solve", "cg"]

Matvec = Callable[[Tensor], Tensor]
Reason = Literal["converged", "maxiter", "negative curvature", "stagnation", "breakdown"]
NegativeCurvature = Literal["stop", "ignore"]

# The curvature pᵀAp counts as positive if it exceeds this many roundings of ‖p‖‖Ap‖. A positive
# definite A has pᵀAp / (‖p‖‖Ap‖) ≥ 2√κ/(κ + 1). Only a condition number κ > 10¹² (in float32) lets
# pᵀAp fall below, and float32 cannot tell such an A from a singular matrix.
CURVATURE_ROUNDINGS = 10


@dataclass(frozen=True, kw_only=True)
class Solve:
    """How the solution of a linear system A x = b went.

    Attributes:
        products: How many times A was applied.
        reason: Why the iteration stopped. `"converged"`: the residual met its bound. `"maxiter"`:
            CG used all its products, or the callback ended the solve. `"negative curvature"`: pᵀAp
            was not positive. `"stagnation"`: rounding keeps ‖b − A x‖ above its bound, or the
            system has no solution. `"breakdown"`: the dtype cannot represent the next step.
        residuals: The residual norms ‖b − A x_k‖, one per iterate, from the starting point on.
        decrease: How far the quadratic model ½ xᵀAx − bᵀx lies below 0, its value at x = 0.
    """

    products: int
    reason: Reason
    residuals: tuple[float, ...]
    decrease: float

    @property
    def converged(self) -> bool:
        """Whether the last residual met its bound."""
        return self.reason == "converged"


class CGResult(NamedTuple):
    """What `cg` returns.

    Attributes:
        x: The approximate solution, in the shape and dtype of `b`.
        solve: How the solution went.
    """

    x: Tensor
    solve: Solve


@torch.no_grad()
def cg(
    A: Matvec,
    b: Tensor,
    x0: Tensor | None = None,
    *,
    M: Matvec | None = None,
    maxiter: int | None = None,
    tol: float = 1e-5,
    atol: float = 1e-8,
    negative_curvature: NegativeCurvature = "stop",
    callback: Callable[[Tensor], object] | None = None,
) -> CGResult:
    """Solve A x = b by conjugate gradients, for a symmetric A given as a function.

    For positive definite A, the iterate x_k minimises the quadratic model ½ xᵀAx − bᵀx over x_0
    plus the span of r_0, A r_0, …, A^{k−1} r_0. The iteration ends when the residual is small,

        ‖b − A x‖ ≤ max(tol · ‖b‖, atol),

    which `cg` tests before the first product, so that b = 0 costs no product. CG updates the
    residual by a recurrence, and rounding lets the recurrence drift from b − A x. If the drift may
    be as large as the residual, or may decide the test, `cg` computes b − A x by one more product,
    and restarts the iteration from x, or ends if b − A x has not halved since the last time.

    Args:
        A: The function v ↦ A v, from and to tensors of the shape of `b`. A must be linear and
            symmetric. Autograd is on while A runs.
        b: The right-hand side, a tensor of any shape, real floating point. The solve runs in the
            dtype and on the device of `b`; `b` is not changed.
        x0: The starting point, in the shape of `b`; zero if `None`. `x0` is not changed, and costs
            one product.
        M: A preconditioner: a symmetric positive definite function that approximates A⁻¹.
        maxiter: The most products, besides the product for `x0`; `None` means `10 * b.numel()`,
            since rounding makes some systems take more iterations than they have unknowns.
        tol: Bound on the residual norm, relative to ‖b‖.
        atol: Bound on the residual norm, absolute, in the units of `b`.
        negative_curvature: What to do if a search direction p has a pᵀAp that is not positive
            beyond rounding. `"stop"` returns the last iterate, or x0 + M r0 if p is the first
            direction: the quadratic model never ends above its start. `"ignore"` moves to the
            stationary point of the model along p, a maximum if pᵀAp < 0.
        callback: Called with each new iterate. If the callback returns True, the solve ends.

    Returns:
        The solution, and how it went.

    Raises:
        TypeError: A or M is not a function, `b` is not real floating point, or A, M or `x0`
            disagree with the dtype of `b`.
        ValueError: Shapes or devices disagree, an option is out of range, `b` or `x0` is not finite
            or too large to square, or rᵀMr is negative.
        RuntimeError: A returned a number that is not finite; the message names the iteration.

    Note:
        On a GPU, each iteration waits for the device once, to decide whether to stop, and each
        solve waits once more. If `b` has half precision, A and M run in the dtype of `b`, and the
        iteration runs in float32. A `b` whose squares underflow counts as zero.

    Source:
        Hestenes and Stiefel, "Methods of Conjugate Gradients for Solving Linear Systems" (1952), as
        explained by Shewchuk (1994); stopping at negative curvature as in Dembo and Steihaug,
        "Truncated-Newton algorithms for large-scale unconstrained optimization" (1983); the drift
        after Greenbaum, "Estimating the attainable accuracy of recursively computed residual
        methods" (1997).
    """
    options = dict(maxiter=maxiter, tol=tol, atol=atol, negative_curvature=negative_curvature)
    _check_options(options)
    if not isinstance(b, Tensor):
        raise TypeError(f"b must be a tensor, not {type(b).__name__}.")
    if not b.is_floating_point():
        raise TypeError(f"b must be real floating point, but is {b.dtype}: convert it, b.float().")
    wide = torch.promote_types(b.dtype, torch.float32)
    A = _checked("A(p)", A, b)
    M = _checked("M(r)", M, b) if M is not None else lambda r: r
    b, narrow = b.to(wide), b.dtype
    zero = torch.zeros_like(b)
    x, r, products = zero, b, 0
    if x0 is not None:
        x = _like(zero.to(narrow), "x0", x0).to(wide, copy=True)
        r, products = b - A(x), 1
    b_norm, x_norm, r_norm, model = _numbers(_norm(b), _norm(x), _norm(r), -_dot(x, b + r) / 2)
    _check_finite("b", b, b_norm, ValueError)
    _check_finite("x0", x, x_norm, ValueError)
    _check_finite("A(x0)", r, r_norm, RuntimeError)

    limit = products + (10 * b.numel() if maxiter is None else int(maxiter))
    bound = max(tol * b_norm, atol)
    # A rounds in the dtype of b, and the inner product pᵀAp rounds in the dtype of the iteration.
    rounding = torch.finfo(narrow).eps + CURVATURE_ROUNDINGS * torch.finfo(wide).eps
    computed = r_norm  # the residual norm where b − A x was last computed
    A_norm = new_path = 0.0  # the largest ‖Ap‖/‖p‖, and the length of the path since then
    path = x_norm  # the length of the whole path, at least ‖x‖
    reason: Reason = "converged"
    residuals = [r_norm]
    steps = _steps(A, M, x, r)
    while True:
        # How far rounding may keep b − A x from zero, and how far the recurrence from b − A x.
        floor, drift = (torch.finfo(narrow).eps * A_norm * way for way in (path, new_path))
        met = residuals[-1] <= bound
        if met and floor <= bound / 10:
            break
        if products >= limit:
            reason = "maxiter"
            break
        products += 1
        k = len(residuals)
        if met or drift >= residuals[-1]:
            r = b - A(x)
            r_norm, model = _numbers(_norm(r), -_dot(x, b + r) / 2)
            residuals[-1] = r_norm
            if bound < r_norm <= computed / 2:
                computed, new_path, steps = r_norm, 0.0, _steps(A, M, x, r)
                continue
            reason = "converged" if r_norm <= bound else "stagnation"
            break
        # The iteration's one wait for the device fetches all numbers that decide about this step.
        p, Ap, rz, pAp, x_next, r_next = next(steps)
        rMr, curvature, p_norm, Ap_norm, r_norm, x_peak = _numbers(
            rz, pAp, _norm(p), _norm(Ap), _norm(r_next), x_next.to(narrow).abs().amax().to(wide)
        )
        if rMr < 0 or math.isnan(rMr):
            raise ValueError(f"M must be positive definite, but rᵀMr is {rMr} at iteration {k}.")
        _check_finite(f"At iteration {k}, A(p)", Ap, Ap_norm, RuntimeError)
        nonpositive = curvature <= rounding * p_norm * Ap_norm and rMr > 0
        if nonpositive and negative_curvature == "stop":
            reason = "negative curvature"
        elif not (rMr > 0 and x_peak < math.inf and r_norm < math.inf):  # NaN is not
            reason = "breakdown"
        if reason != "converged":
            if k == 1 and rMr > 0:  # there is no iterate yet, but p = M r points downhill
                x, model = x + p, model + curvature / 2 - rMr
            break
        x = x_next
        residuals.append(r_norm)
        model -= rMr**2 / (2 * curvature)
        A_norm = max(A_norm, Ap_norm / p_norm)
        path += (length := abs(rMr / curvature) * p_norm)
        new_path += length
        if callback is not None and callback(x.to(narrow)) is True:
            reason = "maxiter"
            break
    solve = Solve(products=products, reason=reason, residuals=tuple(residuals), decrease=-model)
    return CGResult(x.to(narrow), solve)


def _steps(
    A: Matvec,
    M: Matvec,
    x: Tensor,
    r: Tensor,
) -> Iterator[tuple[Tensor, ...]]:
    """The steps of CG from x, with the residual r, one product each."""
    z = M(r)
    p, rz = z, _dot(r, z)
    while True:
        Ap = A(p)
        pAp = _dot(p, Ap)
        alpha = rz / pAp
        x, r = x + alpha * p, r - alpha * Ap
        yield p, Ap, rz, pAp, x, r
        z = M(r)
        rz_next = _dot(r, z)
        beta = rz_next / rz
        p, rz = z + beta * p, rz_next


def _checked(name: str, function: Matvec, b: Tensor) -> Matvec:
    """Let a function run in the dtype of b, with autograd on, and check that results are like b."""
    if isinstance(function, Tensor) or not callable(function):
        raise TypeError(
            f"{name[0]} must be a function of a vector, not {type(function).__name__}: for a "
            "matrix, pass lambda v: matrix @ v."
        )
    wide = torch.promote_types(b.dtype, torch.float32)

    def product(v: Tensor) -> Tensor:
        with torch.enable_grad():
            return _like(b, name, function(v.to(b.dtype))).to(wide)

    return product


def _dot(u: Tensor, v: Tensor) -> Tensor:
    """The inner product uᵀv. This pairwise sum loses fewer digits in float32 than a BLAS dot."""
    return (u * v).sum()


def _norm(v: Tensor) -> Tensor:
    """‖v‖ by `_dot`, so that ‖v‖ underflows exactly if vᵀv does."""
    return _dot(v, v).sqrt()


def _numbers(*scalars: Tensor) -> list[float]:
    """Several 0-dimensional tensors as Python numbers, by one wait for the device."""
    numbers: list[float] = torch.stack(scalars).tolist()
    return numbers


def _like(other: Tensor, name: str, tensor: Tensor) -> Tensor:
    """Detach a tensor, and raise unless its shape, device and dtype are those of another tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}.")
    for aspect, error in (("shape", ValueError), ("device", ValueError), ("dtype", TypeError)):
        found, expected = getattr(tensor, aspect), getattr(other, aspect)
        if found != expected:
            raise error(f"{name} must have {aspect} {expected}, but has {found}.")
    return tensor.detach()


_FINITE = (lambda x: 0 <= x < math.inf, "finite and at least 0")
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("lr", "damping", "tol", "atol", "weight_decay"), _FINITE),
    "maxiter": (
        lambda x: x is None or (hasattr(x, "__index__") and x >= 0),
        "None or an integer of at least 0",
    ),
    "negative_curvature": (lambda x: x in ("stop", "ignore"), "'stop' or 'ignore'"),
    "warm_start": (lambda x: 0 <= x <= 1, "from 0 to 1"),
    "max_length": (lambda x: x > 0, "greater than 0"),
}


def _check_options(options: Mapping[str, Any]) -> None:
    """Raise if an option is out of range."""
    for name in _RANGES.keys() & options:
        allowed, words = _RANGES[name]
        try:
            valid = allowed(options[name])
        except TypeError:  # no number
            valid = False
        if not valid:
            raise ValueError(f"{name} must be {words}, but is {options[name]!r}.")


def _check_finite(name: str, v: Tensor, norm: float, error: type[Exception]) -> None:
    """Raise if the norm of v is not finite, and say why."""
    if not math.isfinite(norm):
        peak = v.abs().amax().item()
        raise error(
            f"{name} is too large, up to {peak}: its norm overflows. Scale it down."
            if math.isfinite(peak)
            else f"{name} has numbers that are not finite: up to {peak}."
        )


@dataclass(frozen=True, eq=False)
class Block:
    """The parameters of one linear system, and the curvature product over their n numbers.

    Calling a block multiplies each of V rows, `[V, n] → [V, n]`; so a block is a `Product`.

    Attributes:
        names: The names of the parameters.
        parameters: The parameters.
        groups: The optimizer's group of each parameter.
        product: The product that the parameters carry.
    """

    names: tuple[str, ...]
    parameters: tuple[Tensor, ...]
    groups: tuple[dict[str, Any], ...]
    product: Callable[[Tensor], Tensor]

    def __call__(self, v: Tensor) -> Tensor:
        """Multiply each of the V rows of v, `[V, n] → [V, n]`.

        Raises:
            TypeError: The product returns another dtype, or no tensor.
            ValueError: The product returns another shape.
        """
        over_block = hasattr(self.product, "parameters")
        vectors = v if over_block else v.view(len(v), *self.parameters[0].shape)
        with torch.set_grad_enabled(over_block):  # autograd slows BackPACK's down by a fifth
            result = self.product(vectors)
        return _like(vectors, "The curvature product", result).reshape(v.shape)

    def split(self, v: Tensor) -> Iterator[tuple[Tensor, dict[str, Any], Tensor]]:
        """Each parameter p, the group of p, and the part of the n numbers v in the shape of p."""
        parts = v.split([p.numel() for p in self.parameters])
        for p, group, part in zip(self.parameters, self.groups, parts, strict=True):
            yield p, group, part.view_as(p)

    def gather(self, value: Callable[[Tensor, dict[str, Any]], Tensor]) -> Tensor:
        """Concatenate the values of a function of a parameter and its group to n numbers."""
        pairs = zip(self.parameters, self.groups, strict=True)
        return torch.cat([value(p, group).reshape(-1) for p, group in pairs])


# Options that must agree within a block: damping and weight_decay may differ, and max_length must
# agree over all blocks.
_SOLVE_OPTIONS = ("maxiter", "tol", "atol", "negative_curvature")
_BLOCK_OPTIONS = ("lr", *_SOLVE_OPTIONS, "warm_start")


class CGNOptimizer(Optimizer):
    """Newton's method with conjugate gradients on matrix-free curvature products.

    For each block of parameters x with gradient g, a step solves

        (C + λI) v = −g    and moves    x ← x + γ v,

    where C is a diagonal block of the curvature matrix, known by its products with vectors only.
    BackPACK's products have one parameter per block; other products may have several, see the note.
    The optimizer solves for all blocks before any parameter moves.

    Use the optimizer for least squares to many digits, as one block with `JacobianGGN`, a
    `preconditioner` and `LevenbergMarquardt`. On noisy mini-batches, try Muon and Adam first. Tune
    `damping`, then `lr`. A step costs up to `maxiter` products per block, and a product costs up to
    a few gradients.

    Args:
        parameters: Parameters, named parameters, or dictionaries that define groups.
        bp_extension: The extension that leaves the products, such as a `GGN` or BackPACK's
            `GGNMP()`. Its `savefield` names the attribute that carries a parameter's product.
        lr: Step size γ.
        damping: λ, added to the diagonal of C, in the units of C.
        maxiter: The most CG iterations per block and step; `None` means ten times the block's size.
        tol: CG stops when ‖(C + λI) v + g‖ ≤ max(tol · ‖g‖, atol).
        atol: See `tol`; in the units of the gradient.
        weight_decay: μ of the penalty ½ μ‖x‖², which adds μx to g and μI to C.
        negative_curvature: What CG does if C + λI is not positive definite, `"stop"` or
            `"ignore"`, see `cg`.
        warm_start: Each solve starts from this factor, 0 to 1, times the last step's v. A factor
            above 0 costs one more product per step. In return, a solve of few iterations continues
            the solve of the last step. If that ends uphill, the block is solved from zero instead.
        max_length: Bound on the length of the step, `γ √(Σ max(|vᵀ(C + λI)v|, |gᵀv|))`, summed over
            the blocks; a longer step is scaled down to the bound. The first number measures v in
            the metric of the curvature; after a solve from zero, both numbers are equal. The second
            number also bounds steps of zero or negative curvature. No product is needed.
        preconditioner: Called as `preconditioner(block, lam)` before each solve, with the `Block`,
            which multiplies by C, and the n numbers λ + μ. The result is the M of `cg`. `None`
            means M = I. See `cgn_tutorial.preconditioner`.

    Attributes:
        bp_extension: As given.
        preconditioner: As given.
        predicted: The change of the loss that the last step promised: the value of the damped
            quadratic model at the end of the step, summed over the blocks.
        solves: How the solves of the last step went: for the names of a block's parameters, a
            `Solve`. Its residuals are the norms ‖(C + λI) v + g‖; its `decrease` holds for γ = 1.

    Raises:
        TypeError: `bp_extension` has no `savefield`, `preconditioner` is no function, or a
            parameter is complex.
        ValueError: A hyperparameter is out of range.

    Note:
        A product over a block is a function `[V, n] → [V, n]` that multiplies each of V vectors.
        Its attribute `parameters` lists the block's parameters, in the order of the n numbers, and
        each of these parameters carries the product. A product without this attribute, such as
        BackPACK's, multiplies over the one parameter p that carries the product,
        `[V, *p.shape] → [V, *p.shape]`.

        All hyperparameters from `lr` on, but for `preconditioner`, are options of parameter groups,
        and may change between steps. Within a block, all options but `damping` and `weight_decay`
        must agree; `max_length` must agree over all blocks of a step.

        Several processes that share a batch take the step of the whole batch with
        `cgn_tutorial.parallel.whole_batch`.

    Example:
        >>> from backpack import backpack, extend
        >>> from backpack.extensions import GGNMP
        >>> model = extend(torch.nn.Linear(2, 3))
        >>> loss_function = extend(torch.nn.CrossEntropyLoss())
        >>> optimizer = CGNOptimizer(model.parameters(), GGNMP())
        >>> inputs, targets = torch.randn(8, 2), torch.randint(3, (8,))
        >>> for _ in range(5):
        ...     optimizer.zero_grad()
        ...     loss = loss_function(model(inputs), targets)
        ...     with backpack(optimizer.bp_extension):
        ...         loss.backward()
        ...     optimizer.step()

    Source:
        The optimizer of BackPACK's example "Matrix-free second-order optimization" (Dangel,
        Kunstner and Hennig, 2020); block-diagonal Hessian-free optimization by Zhang et al.
        (2017), after Martens (2010).
    """

    # With this attribute, a GradScaler tells the optimizer that the loss was scaled: see `step`.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        parameters: Iterable[Any],
        bp_extension: Any,
        lr: float = 0.1,
        damping: float = 1e-2,
        maxiter: int | None = 100,
        tol: float = 1e-1,
        atol: float = 1e-8,
        *,
        weight_decay: float = 0.0,
        negative_curvature: NegativeCurvature = "stop",
        warm_start: float = 0.0,
        max_length: float = math.inf,
        preconditioner: Callable[[Block, Tensor], Matvec] | None = None,
    ) -> None:
        savefield = getattr(bp_extension, "savefield", None)
        if not isinstance(savefield, str) or not savefield.isidentifier():
            raise TypeError(
                "bp_extension must have a savefield, the name of the attribute that carries each "
                f"parameter's product, but {bp_extension!r} has {savefield!r}: pass an instance, "
                "such as GGNMP()."
            )
        if preconditioner is not None and not callable(preconditioner):
            raise TypeError(
                "preconditioner must be a function of a block and λ, such as Nystrom(rank=50), not "
                f"{preconditioner!r}."
            )
        self.bp_extension = bp_extension
        self.preconditioner = preconditioner
        self.predicted = 0.0
        self.solves: dict[tuple[str, ...], Solve] = {}
        defaults = dict(
            lr=lr, damping=damping, maxiter=maxiter, tol=tol, atol=atol, weight_decay=weight_decay,
            negative_curvature=negative_curvature, warm_start=warm_start, max_length=max_length,
        )  # fmt: skip
        super().__init__(parameters, defaults)

    def __getstate__(self) -> dict[str, Any]:
        own = "bp_extension", "preconditioner", "predicted", "solves"
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Solve for the Newton steps of all blocks, then move all parameters.

        Args:
            closure: Evaluates the model, runs the backward pass, which leaves gradients and
                products, and returns the loss.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: A parameter has a gradient, but no curvature product, or a system cannot
                be solved (numbers not finite, wrong shapes or dtypes, sparse gradients): the
                message names the parameters. Or a GradScaler has scaled the loss, or several
                processes run and a product is not averaged over them. No parameter has moved.
            ValueError: An option is out of range, or disagrees within a block.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        blocks = self.blocks()
        _check_averaged(blocks)
        if vars(self).pop("found_inf", None) is not None:  # set by GradScaler.step
            raise RuntimeError(
                "A GradScaler scales the loss, so that the curvature products do not fit the "
                "damping: compute gradients and products from the loss itself, and call "
                "optimizer.step(). Nothing has been changed."
            )

        solved = [(block, *self._solve(block)) for block in blocks]
        scale = self._scale(solved)
        self.state.clear()
        for block, solution, _ in solved:
            for p, group, v in block.split(solution):
                p.add_(v, alpha=scale * group["lr"])
                if group["warm_start"]:
                    self.state[p]["v"] = v
                delattr(p, self.bp_extension.savefield)  # frees the graph of the product
        self.solves = {block.names: solve for block, _, solve in solved}
        return loss

    def _solve(self, block: Block) -> CGResult:
        """Solve (C + λI) v = −g for one block, with v and g flattened to n numbers."""
        options = {name: block.groups[0][name] for name in _SOLVE_OPTIONS}
        try:
            g = block.gather(_gradient)
            lam = block.gather(lambda p, o: torch.full_like(p, o["damping"] + o["weight_decay"]))
            x0 = None
            if all(p in self.state for p in block.parameters):
                x0 = block.gather(lambda p, o: o["warm_start"] * self.state[p]["v"])
            if self.preconditioner is not None:
                options["M"] = self.preconditioner(block, lam)
            return _descent(lambda v: block(v[None])[0] + lam * v, -g, x0, **options)
        except ConnectionError:  # of several processes, which cannot go on
            raise
        except Exception as error:  # products may raise anything
            for p in block.parameters:
                self.state.pop(p, None)  # else a start that overflows fails again
            raise RuntimeError(
                f"No Newton step for {', '.join(block.names)}: solving A v = b, with A = C + λI "
                f"and b = −gradient, failed: {str(error).rstrip('.')}. No parameter has been "
                "changed; optimizer.zero_grad() and the next batch go on from here."
            ) from error

    def _scale(self, solved: list[tuple[Block, Tensor, Solve]]) -> float:
        """Set `predicted`, and return the factor that shortens the step to max_length."""
        slope = curvature = length = 0.0
        for block, solution, solve in solved:
            wide = torch.promote_types(solution.dtype, torch.float32)
            lr, gradient = block.groups[0]["lr"], block.gather(_gradient).to(wide)
            gv = _dot(gradient, solution.to(wide)).item()  # waits for the device
            vAv = -2 * (solve.decrease + gv)
            slope += lr * gv
            curvature += lr**2 * vAv
            length += lr**2 * max(abs(vAv), abs(gv))
        limit = solved[0][0].groups[0]["max_length"] if solved else math.inf
        scale = limit / math.sqrt(length) if length > limit**2 else 1.0
        self.predicted = float(scale * slope + scale**2 * curvature / 2)
        return scale

    def blocks(self) -> list[Block]:
        """The blocks of all parameters with a gradient, in the order of their first parameters.

        Call this method after a backward pass and before `step()`. The method changes nothing.

        Raises:
            RuntimeError: A parameter has a gradient, but no curvature product, or cannot be moved.
                The message names the parameter, and the remedy.
            ValueError: An option is out of range, or disagrees within a block.
        """
        held: dict[Tensor, tuple[str, dict[str, Any]]] = {}
        for j, group in enumerate(self.param_groups):
            _check_options(group)
            names = group.get("param_names", ())
            for i, (p, name) in enumerate(zip_longest(group["params"], names)):
                held[p] = name or f"parameter {i} of group {j} (shape {tuple(p.shape)})", group
        blocks: list[Block] = []
        done: set[Tensor] = set()
        for p in held:
            if p.grad is None or not p.requires_grad or p in done:
                continue
            if not hasattr(p, self.bp_extension.savefield) and not p.grad.to_dense().any():
                continue  # zero_grad wrote zeros, and the loss leaves p out
            blocks.append(self._block(p, held))
            done.update(blocks[-1].parameters)
        _check_agreement("max_length", "over all blocks", blocks)
        return blocks

    def _block(self, p: Tensor, held: dict[Tensor, tuple[str, dict[str, Any]]]) -> Block:
        """The block of p. Raise unless this optimizer can solve for all parameters of the block."""
        savefield = self.bp_extension.savefield
        product: Any = getattr(p, savefield, None)
        members = tuple(getattr(product, "parameters", (p,)))
        for member in members:
            if member not in held:
                fault = f"of shape {tuple(member.shape)} is not held by this optimizer"
            elif member.grad is None:
                fault = "has no gradient"
            elif member.grad.layout != torch.strided:
                fault = "has a sparse gradient: use a layer with sparse=False"
            elif any(
                n > 1 and not step for n, step in zip(member.shape, member.stride(), strict=True)
            ):
                fault = "holds several entries in one place of memory: make it of a .clone()"
            elif product is None or getattr(member, savefield, None) != product:
                fault = (
                    f"has a gradient, but no curvature product .{savefield}: call "
                    "loss.backward() inside `with backpack(optimizer.bp_extension):`, or, for "
                    "products by autograd, optimizer.bp_extension.backward(loss, outputs). "
                    "A product serves one step"
                )
            else:
                continue
            raise RuntimeError(
                f"No Newton step for the block of {held[p][0]}: "
                f"{held.get(member, ['a parameter'])[0]} {fault}. Nothing has been changed."
            )
        names, groups = zip(*(held[member] for member in members), strict=True)
        block = Block(names, members, groups, product)
        for option in _BLOCK_OPTIONS:
            _check_agreement(option, "within a block", [block])
        return block

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; the dictionary may set hyperparameters for the group.

        Args:
            param_group: `{"params": …}` and any of the constructor's hyperparameters.

        Raises:
            TypeError: A parameter is complex.
            ValueError: A hyperparameter is out of range.
        """
        _check_options(self.defaults | param_group)
        super().add_param_group(param_group)
        for i, p in enumerate(self.param_groups[-1]["params"]):
            if p.is_complex():
                self.param_groups.pop()
                raise TypeError(
                    f"Parameters must be real, but parameter {i} of the group, of shape "
                    f"{tuple(p.shape)}, is {p.dtype}: train torch.view_as_real of it."
                )


def _descent(A: Matvec, b: Tensor, x0: Tensor | None, **options: Any) -> CGResult:
    """Solve from x0. If the model ends above its value at zero, solve from zero instead."""
    first = cg(A, b, x0, **options)
    if x0 is None or first.solve.decrease >= 0:
        return first
    x, solve = cg(A, b, **options)
    return CGResult(x, replace(solve, products=first.solve.products + solve.products))


def _gradient(p: Tensor, group: dict[str, Any]) -> Tensor:
    """The gradient of the loss and the penalty."""
    gradient: Tensor = p.grad + group["weight_decay"] * p
    return gradient


def _check_agreement(option: str, where: str, blocks: list[Block]) -> None:
    """Raise if an option differs between the parameters of blocks."""
    values = [group[option] for block in blocks for group in block.groups]
    if any(value != values[0] for value in values):
        names = [name for block in blocks for name in block.names]
        raise ValueError(
            f"{option} must agree {where}, but is {values} for {', '.join(names)}. "
            "Nothing has been changed."
        )


def _check_averaged(blocks: list[Block]) -> None:
    """Raise if several processes run and a product is not averaged over them."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    several = distributed and torch.distributed.get_world_size() > 1
    if several and not all(getattr(block.product, "averaged", False) for block in blocks):
        raise RuntimeError(
            "torch.distributed runs several processes, and each would solve with the curvature of "
            "its own data, so that their parameters drift apart. Call whole_batch(optimizer, "
            "batch_size) after the backward pass. Nothing has been changed."
        )
