"""Conjugate gradients, and a Newton optimizer built on them, in one file to copy.

Newton's method steps to the minimum of a local quadratic model: it solves

    (C + λI) v = −g,        x ← x + γ v

with the gradient g, a curvature matrix C, the damping λ and the step size γ. C is far too large to
store, but conjugate gradients only ever ask for its product with a vector. `cg` solves such a
system, `CGNOptimizer` applies it to the parameters of a network.

The file needs nothing but PyTorch. The curvature products come from BackPACK or from any code that
leaves a function on each parameter, see `CGNOptimizer`.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from itertools import islice, zip_longest
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["BlockSolve", "CGNOptimizer", "CGResult", "LevenbergMarquardt", "Solve", "cg"]

Product = Callable[[Tensor], Tensor]
Reason = Literal["converged", "maxiter", "negative curvature", "breakdown"]
NegativeCurvature = Literal["stop", "ignore"]


# A step's curvature pᵀAp counts as positive above this many roundings of ‖p‖‖Ap‖. For a positive
# definite A, pᵀAp / (‖p‖‖Ap‖) ≥ 2√κ/(κ + 1), so that only condition numbers κ > 10¹² (in float32)
# can fall below: there the dtype cannot tell A from a singular matrix.
CURVATURE_ROUNDINGS = 10


@dataclass(frozen=True, kw_only=True)
class Solve:
    """How the solution of a linear system went.

    Attributes:
        products: How many times A was applied.
        reason: Why the iteration stopped: `"converged"` (the residual met its bound), `"maxiter"`,
            `"negative curvature"` (pᵀAp was not positive), or `"breakdown"` (the next step could
            not be represented: pᵀAp = 0 or an overflow).
        residuals: The norms ‖b − A x_k‖ of the recurrence, one per iterate, the first at `x0`.
        model: The value of the quadratic model ½ xᵀAx − bᵀx at the solution. It is 0 at x = 0, so
            for a Newton step it is the change of the loss that the step promises.
    """

    products: int
    reason: Reason
    residuals: tuple[float, ...]
    model: float

    @property
    def converged(self) -> bool:
        """Whether the last residual met its bound."""
        return self.reason == "converged"


@dataclass(frozen=True, kw_only=True)
class CGResult(Solve):
    """What `cg` returns: the solution, and how it went, see `Solve`.

    Attributes:
        x: The approximate solution, in the shape and dtype of `b`.
    """

    x: Tensor


@torch.no_grad()
def cg(
    A: Product,
    b: Tensor,
    x0: Tensor | None = None,
    *,
    M: Product | None = None,
    maxiter: int | None = None,
    tol: float = 1e-5,
    atol: float = 1e-8,
    negative_curvature: NegativeCurvature = "stop",
    callback: Callable[[Tensor], object] | None = None,
) -> CGResult:
    """Solve A x = b by conjugate gradients, for a symmetric A given as a function.

    For positive definite A, the iterate x_k minimises the quadratic model ½ xᵀAx − bᵀx over x_0
    plus the span of r_0, A r_0, …, A^{k−1} r_0. The iteration ends when the residual of the
    recurrence is small,

        ‖b − A x‖ ≤ max(tol · ‖b‖, atol),

    which is tested before the first product: b = 0 costs none.

    Args:
        A: The matrix as a function, from a tensor of the shape of `b` to another one. It must be
            linear and symmetric.
        b: The right-hand side, a tensor of any shape, real floating point. The solve runs in its
            dtype and on its device; it is not changed.
        x0: The starting point, in the shape of `b`; zero if `None`. It is not changed. It costs one
            product.
        M: A preconditioner: a symmetric positive definite function that approximates A⁻¹.
        maxiter: The most iterations, each one product; `None` means `10 * b.numel()`, since
            rounding makes some systems take more iterations than they have unknowns.
        tol: Bound on the residual norm, relative to ‖b‖.
        atol: Bound on the residual norm, absolute, in the units of `b`.
        negative_curvature: What to do when pᵀAp along a search direction p is not positive beyond
            rounding. `"stop"` returns the iterate reached, or, on the first step, x0 + M r0, so
            that the quadratic model never ends above its start. `"ignore"` steps on to the
            stationary point along p, which for pᵀAp < 0 is a maximum.
        callback: Called with each new iterate.

    Returns:
        The solution, the number of products, the reason for stopping, the residual norms, and the
        value of the quadratic model.

    Raises:
        TypeError: `b` is not real floating point, or A, M or `x0` disagree with its dtype.
        ValueError: Shapes or devices disagree, an option is out of range, `b` or `x0` is not finite
            or too large to square, or rᵀMr is not positive.
        RuntimeError: A returned a number that is not finite; the message says when.

    Note:
        On a GPU, each iteration waits for the device once, to decide whether to stop, and each
        solve once more. For `b` in half precision, only A and M run in its dtype, and the iteration
        in float32. A `b` so small that its squares underflow counts as zero.

    Source:
        Hestenes and Stiefel, "Methods of Conjugate Gradients for Solving Linear Systems" (1952), as
        explained by Shewchuk (1994); stopping at negative curvature as in Dembo and Steihaug,
        "Truncated-Newton algorithms for large-scale unconstrained optimization" (1983).
    """
    _check_options(maxiter, tol, atol, negative_curvature)
    if not isinstance(b, Tensor):
        raise TypeError(f"b must be a tensor, not {type(b).__name__}.")
    if not b.is_floating_point():
        raise TypeError(f"b must be real floating point, but is {b.dtype}: convert it, b.float().")
    wide = torch.promote_types(b.dtype, torch.float32)

    def checked(name: str, function: Product) -> Product:
        return lambda v: _like(b, name, function(v.to(b.dtype))).to(wide)

    A, M = checked("A(p)", A), checked("M(r)", M) if M else lambda r: r
    x, r, products = torch.zeros_like(b, dtype=wide), b.to(wide), 0
    if x0 is not None:
        x = _like(b, "x0", x0).to(wide, copy=True)
        r, products = r - A(x), 1
    b_norm, x_norm, r_norm, model = _numbers(
        _norm(b.to(wide)), _norm(x), _norm(r), -_dot(x, b.to(wide) + r) / 2
    )
    _check_finite("b", b, b_norm, ValueError)
    _check_finite("x0", x, x_norm, ValueError)
    _check_finite("A(x0)", r, r_norm, RuntimeError)

    bound = max(tol * b_norm, atol)
    # A and its argument are rounded to the dtype of b, the inner product to that of the iteration.
    rounding = torch.finfo(b.dtype).eps + CURVATURE_ROUNDINGS * torch.finfo(wide).eps
    reason: Reason = "converged"
    residuals = [r_norm]
    steps = islice(_steps(A, M, x, r), 10 * b.numel() if maxiter is None else maxiter)
    while residuals[-1] > bound:
        step = next(steps, None)
        if step is None:
            reason = "maxiter"
            break
        p, Ap, rz, pAp, x_next, r_next = step
        products += 1
        k = len(residuals)
        # All that decides about this step, in the iteration's one wait for the device.
        rMr, curvature, p_norm, Ap_norm, r_norm, x_peak = _numbers(
            rz, pAp, _norm(p), _norm(Ap), _norm(r_next), x_next.to(b.dtype).abs().amax().to(wide)
        )
        if not rMr > 0:
            raise ValueError(f"M must be positive definite, but rᵀMr is {rMr} at iteration {k}.")
        _check_finite(f"At iteration {k}, A(p)", Ap, Ap_norm, RuntimeError)
        flat = negative_curvature == "stop" and curvature <= rounding * p_norm * Ap_norm
        if flat or not (x_peak < math.inf and r_norm < math.inf):  # NaN is not
            reason = "negative curvature" if flat else "breakdown"
            if k == 1:  # there is no iterate yet, but p = M r points downhill
                x, model = x + p, model + curvature / 2 - rMr
            break
        x = x_next
        residuals.append(r_norm)
        model -= rMr**2 / (2 * curvature)
        if callback is not None:
            callback(x.to(b.dtype))
    return CGResult(
        x=x.to(b.dtype), products=products, reason=reason, residuals=tuple(residuals), model=model
    )


def _steps(A: Product, M: Product, x: Tensor, r: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The steps of conjugate gradients from x, with the residual r, one product each."""
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


def _dot(u: Tensor, v: Tensor) -> Tensor:
    """The inner product uᵀv, summed pairwise, which loses less than a BLAS dot in float32."""
    return (u * v).sum()


def _norm(v: Tensor) -> Tensor:
    """‖v‖, from the same sum as `_dot`, so that both vanish together."""
    return _dot(v, v).sqrt()


def _wide(v: Tensor) -> Tensor:
    """The tensor in float32 where it is in half precision, else as it is."""
    return v.to(torch.promote_types(v.dtype, torch.float32))


def _numbers(*scalars: Tensor) -> list[float]:
    """Python numbers of several 0-dim tensors, for one wait."""
    numbers: list[float] = torch.stack(scalars).tolist()
    return numbers


def _like(other: Tensor, name: str, tensor: Tensor) -> Tensor:
    """The tensor, detached, after checking that it is one like another."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}.")
    for aspect, error in (("shape", ValueError), ("device", ValueError), ("dtype", TypeError)):
        found, expected = getattr(tensor, aspect), getattr(other, aspect)
        if found != expected:
            raise error(f"{name} must have {aspect} {expected}, but has {found}.")
    return tensor.detach()


def _check_options(maxiter: int | None, tol: float, atol: float, negative_curvature: str) -> None:
    """Raise if an option of the solve is out of range."""
    if maxiter is not None and not (hasattr(maxiter, "__index__") and maxiter >= 0):
        raise ValueError(f"maxiter must be None or an integer of at least 0, but is {maxiter}.")
    for name, value in (("tol", tol), ("atol", atol)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be finite and at least 0, but is {value}.")
    if negative_curvature not in ("stop", "ignore"):
        raise ValueError(
            f"negative_curvature must be 'stop' or 'ignore', but is {negative_curvature!r}."
        )


def _check_finite(name: str, v: Tensor, norm: float, error: type[Exception]) -> None:
    """Raise if the norm of v is not finite, and say why."""
    if not math.isfinite(norm):
        peak = v.abs().amax().item()
        raise error(
            f"{name} is too large, up to {peak}: its norm overflows. Scale it down."
            if math.isfinite(peak)
            else f"{name} has numbers that are not finite: up to {peak}."
        )


@dataclass(frozen=True, kw_only=True)
class BlockSolve(Solve):
    """What one block's system took in the last step of `CGNOptimizer`, see `Solve`.

    The residuals are the norms ‖(C + λI) v + g‖, from the starting point on, and `model` is the
    change of the loss that its damped quadratic model predicts for the full step v, for this block
    alone.

    Attributes:
        names: The parameters of the block.
    """

    names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class _Block:
    """Parameters that are solved for together, and the product over their n numbers, [n] → [n]."""

    parameters: tuple[Tensor, ...]
    names: tuple[str, ...]
    groups: tuple[dict[str, Any], ...]
    product: Product

    def split(self, v: Tensor) -> Iterable[tuple[Tensor, dict[str, Any], Tensor]]:
        """Each parameter, its group, and its part of the n numbers v, in its shape."""
        parts = v.split([p.numel() for p in self.parameters])
        shaped = [part.view_as(p) for part, p in zip(parts, self.parameters, strict=True)]
        return zip(self.parameters, self.groups, shaped, strict=True)


_HOW_IT_WENT = [field.name for field in fields(Solve)]
_SOLVE_OPTIONS = ("maxiter", "tol", "atol", "negative_curvature")  # must agree within a block
_ALL_OPTIONS = ("lr", "damping", "weight_decay", "warm_start", *_SOLVE_OPTIONS)  # and processes


class CGNOptimizer(Optimizer):
    """Newton's method with conjugate gradients on matrix-free curvature products.

    For each block of parameters x with gradient g, a step solves

        (C + λI) v = −g    and moves    x ← x + γ v,

    where C is the block of a curvature matrix, known through its products only. A block is one
    parameter for BackPACK's products; other code may form larger ones, see below. Every block is
    solved before any parameter moves.

    Use it in place of `torch.optim.SGD` where the gradient vanishes or is badly scaled; `damping`
    and `lr` are the knobs to turn. A step costs up to `maxiter` products per block, each worth up
    to a few gradients, and single mini-batches give noisy curvature: prefer large batches. Where
    SGD or Adam already make good progress per second, they usually win.

    Args:
        parameters: Parameters, named parameters, or dictionaries that define groups.
        bp_extension: Anything with a `savefield`, the name of the attribute that carries the
            curvature product of each parameter, such as `backpack.extensions.GGNMP()`.
        lr: Step size γ.
        damping: λ, added to the diagonal of C, in the units of C.
        maxiter: The most CG iterations per block and step; `None` means ten times its size.
        tol: CG stops when ‖(C + λI) v + g‖ ≤ max(tol · ‖g‖, atol).
        atol: See `tol`; in the units of the gradient.
        weight_decay: μ of an exact penalty ½ μ‖x‖²: adds μx to g and μI to C.
        negative_curvature: What CG does where C + λI is not positive definite, `"stop"` or
            `"ignore"`, see `cg`.
        warm_start: Factor, from 0 to 1, of the last step's v where the next solve starts. 0 starts
            from zero, and anything else costs a product more, but lets solves of few iterations
            carry on from step to step.
        max_length: Bound on γ √(vᵀ(C + λI)v), the length of the whole step over all blocks in the
            metric of its own curvature; a longer step is shortened to it. It costs no product.
        process_group: The processes that hold the same parameters and share a batch, such as
            `torch.distributed.group.WORLD`; `None` steps in this process alone. See below.

    Attributes:
        bp_extension: As given.
        max_length: As given.
        process_group: As given.
        predicted: The change of the loss that the last step promised: the value of the damped
            quadratic model, summed over the blocks, where the step ended. A block with several
            values of γ counts with that of its first parameter.
        solves: What the solves of the last step did, one `BlockSolve` per block.

    Raises:
        TypeError: `bp_extension` has no `savefield`, a parameter is complex, or `process_group` is
            not one that this process belongs to.
        ValueError: A hyperparameter is out of range.

    Note:
        With a `process_group`, all processes take the step of the whole batch. Process i has n_i of
        its N samples, and a loss that is the mean over them; then gradient and products of the
        whole batch are the means of those of the processes, weighted by n_i / N. Every product is
        averaged by one all-reduce. So is the gradient, once per step, unless it is the same
        everywhere to the last bit, as DistributedDataParallel leaves it (with BackPACK's products,
        DistributedDataParallel(extend(model))). All else is computed from
        these averages, by each process for itself; so the processes need the same hardware and
        number of threads to go on with the same parameters, which every step makes sure of.

        The product of a block is a function `[V, n] → [V, n]` that multiplies each of V vectors,
        with an attribute `parameters`, in whose order the n numbers are concatenated; all of them
        carry it. Without that attribute, it is over the parameter p that carries it alone,
        `[V, *p.shape] → [V, *p.shape]`, as BackPACK leaves it. Tolerances must agree within a
        block; damping and lr act per parameter.

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
        process_group: Any = None,
    ) -> None:
        if not max_length > 0:
            raise ValueError(f"max_length must be greater than 0, but is {max_length}.")
        self.max_length = max_length
        self.predicted = 0.0
        self.bp_extension = bp_extension
        self.process_group = process_group
        self.solves: list[Solve] = []
        defaults = {
            "lr": lr,
            "damping": damping,
            "maxiter": maxiter,
            "tol": tol,
            "atol": atol,
            "weight_decay": weight_decay,
            "negative_curvature": negative_curvature,
            "warm_start": warm_start,
        }
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None, *, batch_size: int | None = None
    ) -> float | None:
        """Solve for every block's Newton step, then move every parameter by it.

        Args:
            closure: Evaluates the model, calls `backward()` so that gradients and products are
                there, and returns the loss.
            batch_size: How many samples the loss of this process is the mean of. Needed with a
                `process_group`, and of no effect without.

        Returns:
            What the closure returned, which is the loss of this process.

        Raises:
            RuntimeError: A parameter has a gradient, but no curvature product, or its system cannot
                be solved (numbers that are not finite, wrong shapes or dtypes, sparse gradients).
                The message names the parameter. Nothing has been changed then. With several
                processes, all of them raise if one does, or if their parameters, gradients or
                options do not belong together; or they run without a `process_group`.
            ValueError: The tolerances of the parameters of a block differ, or `batch_size` is
                missing, or it differs where gradients have been averaged without its weights.
            ConnectionError: Another process does not answer: it has died, or is late beyond the
                timeout of the `process_group`. No parameter has been changed then.
        """
        loss: float | None = None

        def blocks() -> list[_Block]:
            nonlocal loss
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            return self._blocks()

        solved = [(block, self._solve(block)) for block in self._together(blocks, batch_size)]
        slope, square = self._along(solved)
        shrink = min(1.0, self.max_length / math.sqrt(square)) if square > 0 else 1.0
        self.predicted = shrink * slope + shrink**2 * square / 2
        for block, result in solved:
            for p, group, v in block.split(result.x):
                p.add_(v, alpha=shrink * group["lr"])
                if group["warm_start"]:
                    self.state[p]["v"] = v
                else:
                    self.state.pop(p, None)
                delattr(p, self._savefield)  # frees what the product holds on to
        self.solves = [
            BlockSolve(names=block.names, **{name: getattr(result, name) for name in _HOW_IT_WENT})
            for block, result in solved
        ]
        return loss

    @torch.no_grad()
    def check_products(self, *, positive: bool = False, probes: int = 3) -> float:
        """Check that the curvature products are symmetric, after a backward pass, before `step()`.

        For random vectors u and v, a symmetric C has uᵀCv = vᵀCu, and one that is positive
        semi-definite uᵀCu ≥ 0. A product that fails either is wrong, and a step on it means
        nothing; one that passes may still be wrong in other ways. Worth a call for each new model,
        loss or extension: torch itself has second derivatives that fail. Nothing is changed, the
        global random generator included.

        Args:
            positive: Whether C must be positive semi-definite, as the GGN of a convex loss is.
            probes: Pairs of vectors per block, each of two products.

        Returns:
            The largest `|uᵀCv − vᵀCu|` found, relative to the mean of ‖Cu‖ and ‖Cv‖.

        Raises:
            RuntimeError: It is larger than half of the dtype's digits allow, or uᵀCu is negative
                beyond that. The message names the parameters of the block. Or a product is missing.
                With several processes, all of them check the mean of their products, and raise.
        """
        worst = 0.0
        for block in self._together(self._blocks, batch_size=1):
            like = block.parameters[0]
            n = sum(p.numel() for p in block.parameters)
            tolerance = torch.finfo(like.dtype).eps ** 0.5
            random = torch.Generator(like.device).manual_seed(0)
            for _ in range(probes):
                u, v = torch.randn(2, n, generator=random, device=like.device, dtype=like.dtype)
                Cu, Cv = block.product(u), block.product(v)
                uCv, vCu, uCu, size = _numbers(
                    _dot(u, Cv), _dot(v, Cu), _dot(u, Cu), (_norm(Cu) + _norm(Cv)) / 2
                )
                gap = abs(uCv - vCu) / size if size else 0.0
                name = f"The curvature product of {', '.join(block.names)}"
                if not gap <= tolerance:
                    raise RuntimeError(
                        f"{name} is not symmetric: uᵀCv = {uCv:.6g}, but vᵀCu = {vCu:.6g}. It "
                        "is no curvature; for Hessians, write the operation whose second "
                        "derivative is at fault in elementary ones."
                    )
                if positive and uCu < -tolerance * size:
                    raise RuntimeError(
                        f"{name} is not positive semi-definite: uᵀCu = {uCu:.6g}. Is the loss "
                        "convex in the outputs?"
                    )
                worst = max(worst, gap)
        return worst

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with hyperparameters of its own where the dictionary has them.

        Args:
            param_group: `{"params": …}` and any of the constructor's hyperparameters.

        Raises:
            TypeError: A parameter is complex.
            ValueError: A hyperparameter is out of range.
        """
        settings = self.defaults | param_group
        for name in ("lr", "damping", "weight_decay"):
            if not 0 <= settings[name] < math.inf:
                raise ValueError(f"{name} must be finite and at least 0, but is {settings[name]}.")
        if not 0 <= settings["warm_start"] <= 1:
            raise ValueError(f"warm_start must be from 0 to 1, but is {settings['warm_start']}.")
        _check_options(**{name: settings[name] for name in _SOLVE_OPTIONS})
        super().add_param_group(param_group)
        for i, p in enumerate(self.param_groups[-1]["params"]):
            if p.is_complex():
                self.param_groups.pop()
                raise TypeError(
                    f"Parameters must be real, but parameter {i} of the group, of shape "
                    f"{tuple(p.shape)}, is {p.dtype}: train torch.view_as_real of it."
                )

    @property
    def bp_extension(self) -> Any:
        """What computes the products: pass it to `with backpack(...)` around the backward pass."""
        if self._bp_extension is None:
            raise RuntimeError(
                "A pickled CGNOptimizer keeps only the savefield of its extension: set "
                f"optimizer.bp_extension to one that writes .{self._savefield}, such as GGNMP()."
            )
        return self._bp_extension

    @bp_extension.setter
    def bp_extension(self, extension: Any) -> None:
        savefield = getattr(extension, "savefield", None)
        if not isinstance(savefield, str) or not savefield.isidentifier():
            raise TypeError(
                "bp_extension must have a savefield, the name of the attribute that carries each "
                f"parameter's product, but {extension!r} has {savefield!r}: pass an instance, such "
                "as GGNMP()."
            )
        self._bp_extension = extension
        self._savefield = savefield

    @property
    def process_group(self) -> Any:
        """The processes that step together, or `None`; a pickled optimizer loses it."""
        return self._process_group

    @process_group.setter
    def process_group(self, group: Any) -> None:
        if group is not None and not isinstance(group, torch.distributed.ProcessGroup):
            raise TypeError(
                "process_group must be None or a group that this process belongs to, such as "
                f"torch.distributed.group.WORLD, but is {group!r}."
            )
        self._process_group = group
        self._share = 1.0

    def __getstate__(self) -> dict[str, Any]:
        kept = ("_savefield", "max_length")
        return super().__getstate__() | {name: getattr(self, name) for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_bp_extension", None)  # BackPACK's extensions do not pickle,
        self.__dict__.setdefault("_process_group", None)  # and neither do process groups
        self.__dict__.setdefault("_share", 1.0)
        self.__dict__.setdefault("solves", [])
        self.__dict__.setdefault("predicted", 0.0)
        for group in self.param_groups:
            group.setdefault("warm_start", 0.0)  # checkpoints from before it have none

    def __deepcopy__(self, memo: dict[int, Any]) -> CGNOptimizer:
        clone = self.__class__.__new__(self.__class__)
        memo[id(self)] = clone
        clone.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        clone._bp_extension = self._bp_extension
        clone._process_group = self._process_group
        return clone

    def _together(self, local: Callable[[], list[_Block]], batch_size: int | None) -> list[_Block]:
        """The blocks of the whole batch: gradients and products averaged over the processes."""
        if self.process_group is None:
            _refuse_several_processes()
            return local()
        blocks: list[_Block] = []
        fault = None
        first = self.param_groups[0]["params"][0]
        mine = torch.zeros(4, dtype=torch.int64, device=first.device)
        try:  # a process that fails must still tell the others, which would wait for it
            blocks = local()
            mine = self._marks(blocks, batch_size).to(first.device)
        except Exception as error:
            fault = error
        all_marks = [torch.empty_like(mine) for _ in range(self.process_group.size())]
        _communicate("all_gather", all_marks, mine, group=self.process_group)
        if fault is not None:
            raise fault
        sizes, *marks = torch.stack(all_marks).T.tolist()
        averaged = _check_marks(sizes, *marks)
        self._share = sizes[self.process_group.rank()] / sum(sizes)
        if not averaged:
            gradients = _gradients(blocks)
            flat = torch.cat([g.reshape(-1).to(first.device) for g in gradients])
            parts = self._mean(lambda: flat, flat).split([g.numel() for g in gradients])
            for g, part in zip(gradients, parts, strict=True):
                g.copy_(part.view_as(g))

        def mean_of(product: Product) -> Product:
            return lambda v: self._mean(lambda: product(v), v)

        return [replace(block, product=mean_of(block.product)) for block in blocks]

    def _mean(self, compute: Callable[[], Tensor], like: Tensor) -> Tensor:
        """The mean of what the processes compute; where one fails, the others get NaN."""
        if self.process_group is None:
            return compute()
        fault = None
        try:
            mean = self._share * compute()
        except Exception as error:
            fault, mean = error, torch.full_like(like, math.nan)
        _communicate("all_reduce", mean, group=self.process_group)
        if fault is not None:
            raise fault
        return mean

    def _marks(self, blocks: list[_Block], batch_size: int | None) -> Tensor:
        """The batch size, and what tells options, parameters and gradients from others."""
        if batch_size is None or not (hasattr(batch_size, "__index__") and batch_size > 0):
            raise ValueError(
                "With a process_group, a step needs the number of samples of this process, at "
                f"least 1, but it is {batch_size}: call optimizer.step(batch_size=len(inputs)). "
                "Nothing has been changed."
            )
        text = [f"{self.max_length}"]
        for block in blocks:
            for name, p, group in zip(block.names, block.parameters, block.groups, strict=True):
                values = [f"{group[option]}" for option in _ALL_OPTIONS]
                text += [name, f"{p.shape} {p.dtype} {p in self.state} of {block.names}", *values]
        parameters = [p for block in blocks for p in block.parameters]
        starts = [self.state[p]["v"] for p in parameters if p in self.state]
        options = torch.tensor(zlib.crc32(repr(text).encode()))
        numbers = _fingerprint([*parameters, *starts])
        marks = torch.tensor(int(batch_size)), options, numbers, _fingerprint(_gradients(blocks))
        return torch.stack([mark.to(numbers.device) for mark in marks])

    def _solve(self, block: _Block) -> CGResult:
        """Solve (C + λI) v = −g for one block, with v and g flattened to n numbers."""
        pairs = list(zip(block.parameters, block.groups, strict=True))
        try:
            g = torch.cat([(p.grad + o["weight_decay"] * p).reshape(-1) for p, o in pairs])
            lam = torch.cat(
                [p.new_full((p.numel(),), o["damping"] + o["weight_decay"]) for p, o in pairs]
            )
            last = [o["warm_start"] * self.state[p]["v"] for p, o in pairs if p in self.state]
            x0 = torch.cat([v.reshape(-1) for v in last]) if len(last) == len(pairs) else None
            options = {name: block.groups[0][name] for name in _SOLVE_OPTIONS}
            return cg(lambda v: block.product(v) + lam * v, -g, x0, **options)
        except ConnectionError:
            raise
        except Exception as error:  # products may raise anything
            raise RuntimeError(
                f"No Newton step for {', '.join(block.names)}: solving A v = b, with A = C + λI "
                f"and b = −gradient, failed: {str(error).rstrip('.')}. No parameter has been "
                "changed; optimizer.zero_grad() and the next batch go on from here."
            ) from error

    def _along(self, solved: list[tuple[_Block, CGResult]]) -> tuple[float, float]:
        """γ gᵀv and γ² vᵀ(C + λI)v, summed over the blocks: the model along the whole step."""
        slope = square = 0.0
        for block, result in solved:
            parts = [
                _dot((p.grad + group["weight_decay"] * p).to(v.dtype), v)
                for p, group, v in block.split(_wide(result.x))
            ]
            gamma, gv = block.groups[0]["lr"], float(sum(parts))  # waits for the device
            slope += gamma * gv
            square += 2 * gamma**2 * (result.model - gv)
        return slope, square

    def _blocks(self) -> list[_Block]:
        """The blocks of all parameters with a gradient, in the order of their first parameters."""
        groups = {p: group for group in self.param_groups for p in group["params"]}
        names = {
            p: name or f"parameter {i} of group {j} (shape {tuple(p.shape)})"
            for j, group in enumerate(self.param_groups)
            for i, (p, name) in enumerate(
                zip_longest(group["params"], group.get("param_names", ()))
            )
        }
        blocks: dict[Tensor, _Block] = {}
        for p in groups:
            if p.grad is not None and p.requires_grad and p not in blocks:
                block = self._block(p, groups, names)
                blocks.update(dict.fromkeys(block.parameters, block))
        return list(dict.fromkeys(blocks.values()))

    def _block(
        self, p: Tensor, groups: dict[Tensor, dict[str, Any]], names: dict[Tensor, str]
    ) -> _Block:
        """The block of p, after checking that this optimizer can solve for all its parameters."""
        product: Any = getattr(p, self._savefield, None)
        # A product over a block names its parameters, and is [V, n] → [V, n]. One that does not,
        # such as BackPACK's, is over p alone, [V, *p.shape] → [V, *p.shape].
        members = tuple(getattr(product, "parameters", (p,)))
        shape = (1, -1) if hasattr(product, "parameters") else (1, *p.shape)
        for member in members:
            if member not in groups:
                fault = f"of shape {tuple(member.shape)} is not held by this optimizer"
            elif member.grad is None:
                fault = "has no gradient"
            elif member.grad.layout != torch.strided:
                fault = "has a sparse gradient: use a layer with sparse=False"
            elif product is None or getattr(member, self._savefield, None) != product:
                fault = (
                    f"has a gradient, but no curvature product .{self._savefield}: call "
                    "loss.backward() inside `with backpack(optimizer.bp_extension):`, or, for "
                    "products by autograd, optimizer.bp_extension.backward(loss, outputs). "
                    "A product serves one step"
                )
            else:
                continue
            raise RuntimeError(
                f"No Newton step for the block of {names[p]}: {names.get(member, 'a parameter')} "
                f"{fault}. Nothing has been changed."
            )

        def flat_product(v: Tensor) -> Tensor:
            vectors = v.view(shape)
            return _like(vectors, "The curvature product", product(vectors)).reshape(-1)

        block_groups = tuple(groups[member] for member in members)
        block_names = tuple(names[member] for member in members)
        for option in _SOLVE_OPTIONS:
            values = [group[option] for group in block_groups]
            if any(value != values[0] for value in values):
                raise ValueError(
                    f"{option} must agree within a block, but is {values} for "
                    f"{', '.join(block_names)}. Nothing has been changed."
                )
        return _Block(members, block_names, block_groups, flat_product)


class LevenbergMarquardt:
    """Damping that adapts to how well the quadratic model foretells the loss.

    After a step v, the change of the loss is compared with the one that the damped model predicts,

        ρ = (L(x + γv) − L(x)) / q(γv),

    and the damping of all parameters follows: λ ← 2/3 λ where ρ > 3/4, as the model is good, and
    λ ← 3/2 λ where ρ < 1/4, as it is not. A step after which the loss is not lower is taken back.

    The loss is that of the batch of the gradient and the curvature, a large one, of several hundred
    samples: judged on another batch, the λ of most runs in the tutorial grew until nothing moved.
    Solve for the whole network as one block, with γ = 1 and a warm start: the model of several
    blocks does not know what they do to each other.

    Args:
        optimizer: What takes the steps.
        minimum: The least λ.

    Attributes:
        optimizer: As given.
        minimum: As given.

    Example:
        >>> from cgn_tutorial import GGN
        >>> model = torch.nn.Linear(2, 3)
        >>> curvature = GGN([model.parameters()])
        >>> optimizer = CGNOptimizer(model.parameters(), curvature, lr=1.0, warm_start=0.95)
        >>> adaptive = LevenbergMarquardt(optimizer)
        >>> inputs, targets = torch.randn(500, 2), torch.randint(3, (500,))
        >>> def evaluate():
        ...     return torch.nn.functional.cross_entropy(model(inputs), targets)
        >>> for _ in range(5):
        ...     optimizer.zero_grad()
        ...     outputs = model(inputs)
        ...     loss = torch.nn.functional.cross_entropy(outputs, targets)
        ...     _ = curvature.backward(loss, outputs)
        ...     rho = adaptive.step(loss, evaluate)

    Source:
        Martens, "Deep learning via Hessian-free optimization" (2010), after Levenberg (1944) and
        Marquardt (1963).
    """

    def __init__(self, optimizer: CGNOptimizer, minimum: float = 1e-4) -> None:
        if not 0 <= minimum < math.inf:
            raise ValueError(f"minimum must be finite and at least 0, but is {minimum}.")
        self.optimizer = optimizer
        self.minimum = minimum

    @torch.no_grad()
    def step(
        self,
        loss: Tensor | float,
        evaluate: Callable[[], Tensor | float],
        *,
        batch_size: int | None = None,
    ) -> float:
        """Let the optimizer step, then adapt its damping, and take the step back if it did harm.

        Args:
            loss: The loss before the step, whose gradients and products are there.
            evaluate: Computes the same loss again, on the same batch, without a backward pass.
            batch_size: As for the optimizer's `step()`. With a `process_group`, both losses are
                those of this process, and are averaged with the same weights as the products, by
                one more all-reduce, so that all processes see the same ratio.

        Returns:
            The ratio ρ. It is −∞ if the loss after the step was not finite.

        Raises:
            RuntimeError: As the optimizer's `step()`. Nothing has been changed then. Or `evaluate`
                failed in another process, after the step.
        """
        groups = self.optimizer.param_groups
        before = [(p, p.clone()) for group in groups for p in group["params"]]
        self.optimizer.step(batch_size=batch_size)
        several = self.optimizer.process_group is not None
        like = torch.zeros(3, dtype=torch.float64, device=before[0][0].device if several else None)
        after, start, failed = self.optimizer._mean(
            lambda: like.new_tensor([float(evaluate()), float(loss), 0.0]), like
        ).tolist()
        if failed:  # NaN is true
            raise RuntimeError("The loss after the step could not be computed in another process.")
        change = after - start
        predicted = self.optimizer.predicted
        rho = change / predicted if predicted < 0 and math.isfinite(change) else -math.inf
        if not change < 0:
            for p, x in before:
                p.copy_(x)
        for group in groups:
            if rho > 3 / 4:
                group["damping"] = max(group["damping"] * 2 / 3, self.minimum)
            elif not rho >= 1 / 4:
                group["damping"] = max(group["damping"], self.minimum) * 3 / 2
        return rho


def _refuse_several_processes() -> None:
    """Raise where gradients may be averages over processes, which products are not."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if distributed and (count := torch.distributed.get_world_size()) > 1:
        raise RuntimeError(
            f"CGNOptimizer steps in one process, but torch.distributed runs {count}: each would "
            "solve with the curvature of its own data, and their parameters would drift apart. "
            "Name the processes that share a batch, process_group=torch.distributed.group.WORLD. "
            "Nothing has been changed."
        )


def _communicate(collective: str, *tensors: Any, group: Any) -> None:
    """Call a collective of torch.distributed, and say what it means where that fails."""
    try:
        getattr(torch.distributed, collective)(*tensors, group=group)
    except Exception as error:
        raise ConnectionError(
            f"Another process does not answer: {str(error).rstrip('.')}. No parameter has been "
            "changed, but the processes cannot go on together: start all of them again from a "
            "checkpoint, as torchrun --max-restarts does."
        ) from error


def _gradients(blocks: list[_Block]) -> list[Tensor]:
    """The gradients of all parameters of these blocks."""
    return [p.grad for block in blocks for p in block.parameters if p.grad is not None]


def _fingerprint(tensors: Iterable[Tensor]) -> Tensor:
    """An integer of all bits of all tensors, 0 for zeros: others have another, but for chance."""
    total = torch.tensor(0)
    for tensor in tensors:
        bits = tensor.detach().reshape(-1).view(torch.int16)
        places = torch.arange(1, 2 * len(bits), 2, dtype=torch.int32, device=bits.device)
        total = 1_000_003 * total.to(bits.device) + (bits * places).sum()  # on purpose, all wrap
    return total


def _check_marks(
    sizes: list[int], options: list[int], parameters: list[int], gradients: list[int]
) -> bool:
    """Raise, in all processes alike, unless they can step together; are gradients averages yet?"""
    if faulty := [i for i, size in enumerate(sizes) if not size]:
        raise RuntimeError(
            f"No Newton step: process {faulty[0]} of {len(sizes)} could not take part, and its own "
            "error says why. Nothing has been changed."
        )
    for what, marks in (
        ("gradients, blocks or options: which parameters have a gradient, lr, damping", options),
        ("parameters or starting points: begin with one seed, or load one checkpoint", parameters),
    ):
        if len(set(marks)) > 1:
            other = next(i for i, mark in enumerate(marks) if mark != marks[0])
            raise RuntimeError(
                f"No Newton step: process {other} differs from process 0 in its {what}, in all of "
                f"the {len(marks)} processes. Nothing has been changed."
            )
    averaged = len(set(gradients)) == 1
    if averaged and gradients[0] and len(set(sizes)) > 1:
        raise ValueError(
            f"No Newton step: the processes have batches of {sizes} samples, but gradients that "
            "are averages without these weights already, as DistributedDataParallel leaves them. "
            "Give all the same number, or use plain modules. Nothing has been changed."
        )
    return averaged
