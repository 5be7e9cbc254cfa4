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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["CGNOptimizer", "CGResult", "Solve", "cg"]

Product = Callable[[Tensor], Tensor]
Reason = Literal["converged", "maxiter", "negative curvature", "breakdown"]
NegativeCurvature = Literal["stop", "ignore"]

# A step's curvature pᵀAp counts as positive above this many roundings of ‖p‖‖Ap‖. For a positive
# definite A, pᵀAp / (‖p‖‖Ap‖) ≥ 2√κ/(κ + 1), so that only condition numbers κ > 10¹² (in float32)
# can fall below: there the dtype cannot tell A from a singular matrix.
CURVATURE_ROUNDINGS = 10


@dataclass(frozen=True)
class CGResult:
    """What `cg` returns.

    Attributes:
        x: The approximate solution, in the shape of `b`.
        products: How many times A was applied.
        reason: Why the iteration stopped: `"converged"` (the residual met its bound), `"maxiter"`,
            `"negative curvature"` (pᵀAp was not positive), or `"breakdown"` (the next step could
            not be represented: pᵀAp = 0 or an overflow).
        residuals: The norms ‖b − A x_k‖ of the recurrence, one per iterate, the first at `x0`.
    """

    x: Tensor
    products: int
    reason: Reason
    residuals: tuple[float, ...]

    @property
    def converged(self) -> bool:
        """Whether the last residual met its bound."""
        return self.reason == "converged"


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
        maxiter: The most iterations, each one product; `None` means `b.numel()`.
        tol: Bound on the residual norm, relative to ‖b‖.
        atol: Bound on the residual norm, absolute, in the units of `b`.
        negative_curvature: What to do when pᵀAp along a search direction p is not positive beyond
            rounding. `"stop"` returns the iterate reached, or, on the first step, x0 + M r0, so
            that the quadratic model never ends above its start. `"ignore"` steps on to the
            stationary point along p, which for pᵀAp < 0 is a maximum.
        callback: Called with each new iterate.

    Returns:
        The solution, the number of products, the reason for stopping, and the residual norms.

    Raises:
        TypeError: `b` is not real floating point, or A, M or `x0` disagree with its dtype.
        ValueError: Shapes or devices disagree, an option is out of range, `b` or `x0` is not
            finite, or rᵀMr is not positive.
        RuntimeError: A returned a number that is not finite; the message says when.

    Note:
        On a GPU, each iteration waits for the device once, to decide whether to stop, and each
        solve twice more. Right-hand sides and starting points may be as small or large as the dtype
        allows: the iteration works on the residual divided by a power of two, which is exact.

    Source:
        Hestenes and Stiefel, "Methods of Conjugate Gradients for Solving Linear Systems" (1952), as
        explained by Shewchuk (1994); stopping at negative curvature as in Steihaug (1983).
    """
    _check_system(b, x0)
    maxiter = b.numel() if maxiter is None else maxiter
    _check_options(maxiter, tol, atol, negative_curvature)
    if b.numel() == 0:
        return CGResult(b.clone(), 0, "converged", (0.0,))
    dot_rounding = CURVATURE_ROUNDINGS * torch.finfo(b.dtype).eps
    largest = torch.finfo(b.dtype).max

    r = b if x0 is None else b - _applied("A", A, x0)
    products = 0 if x0 is None else 1
    b_scale, scale = (_power_of_two(peak, b.dtype) for peak in _finite_peaks(b, x0, r))
    b_norm, r_norm = _numbers(_norm(b / b_scale), _norm(r / scale))
    bound = max(tol * b_norm * b_scale, atol)
    residuals = [r_norm * scale]

    # From here on r is the residual over `scale`, and the iterate is x0 + scale · d.
    r = r / scale
    d = torch.zeros_like(b)

    def iterate(d: Tensor) -> Tensor:
        return scale * d if x0 is None else x0 + scale * d

    z = r if M is None else _applied("M", M, r)
    p, rz = z, _dot(r, z)
    reason: Reason = "converged"
    while residuals[-1] > bound:
        k = len(residuals)
        if k > maxiter:
            reason = "maxiter"
            break
        Ap = _applied("A", A, p)
        products += 1
        pAp = _dot(p, Ap)
        alpha = rz / pAp
        d_next = d + alpha * p
        r_next = r - alpha * Ap

        # Everything that decides about this step, in the iteration's one wait for the device.
        curvature, p_norm, Ap_norm, d_peak, r_norm, rz_value = _numbers(
            pAp, _norm(p), _norm(Ap), d_next.abs().amax(), _norm(r_next), rz
        )
        _check_progress(k, Ap, Ap_norm, rz_value)
        flat = curvature <= dot_rounding * p_norm * Ap_norm < math.inf
        stop = flat and negative_curvature == "stop"
        finite = d_peak * scale <= largest and r_norm < math.inf  # NaN is not
        if stop or not finite:
            reason = "negative curvature" if stop else "breakdown"
            d = p if k == 1 else d
            break

        d, r = d_next, r_next
        residuals.append(r_norm * scale)
        if callback is not None:
            callback(iterate(d))
        z = r if M is None else _applied("M", M, r)
        rz_next = _dot(r, z)
        beta = rz_next / rz
        p, rz = z + beta * p, rz_next

    return CGResult(iterate(d), products, reason, tuple(residuals))


def _dot(u: Tensor, v: Tensor) -> Tensor:
    """The inner product uᵀv, summed pairwise, which loses less than a BLAS dot in float32."""
    return (u * v).sum()


def _norm(v: Tensor) -> Tensor:
    """‖v‖, from the same sum as `_dot`, so that both vanish together."""
    return _dot(v, v).sqrt()


def _numbers(*scalars: Tensor) -> list[float]:
    """Python numbers of several 0-dim tensors, for one wait."""
    return cast(list[float], torch.stack(scalars).tolist())


def _power_of_two(peak: float, dtype: torch.dtype) -> float:
    """A power of two near `peak`, which torch can divide by as well as multiply; 1 for 0."""
    # Torch holds the scalar in float32 for all dtypes below it, too.
    limit = -math.frexp(torch.finfo(torch.promote_types(dtype, torch.float32)).tiny)[1]
    return 2.0 ** min(max(math.frexp(peak)[1], -limit), limit) if peak else 1.0


def _applied(name: str, function: Product, v: Tensor) -> Tensor:
    """function(v), checked to be a tensor like v."""
    result = function(v)
    if not isinstance(result, Tensor):
        raise TypeError(f"{name} must return a tensor, not {type(result).__name__}.")
    if result.shape != v.shape or result.device != v.device:
        raise ValueError(
            f"{name} must return a tensor like its argument, of shape {tuple(v.shape)} on "
            f"{v.device}, but returned shape {tuple(result.shape)} on {result.device}."
        )
    if result.dtype != v.dtype:
        raise TypeError(
            f"{name} must return {v.dtype}, like its argument, but returned {result.dtype}."
        )
    return result.detach()


def _check_system(b: Tensor, x0: Tensor | None) -> None:
    """Raise if b is no right-hand side, or x0 no starting point for it."""
    if not isinstance(b, Tensor):
        raise TypeError(f"b must be a tensor, not {type(b).__name__}.")
    if not b.is_floating_point():
        raise TypeError(f"b must be real floating point, but is {b.dtype}: convert it, b.float().")
    if x0 is None:
        return
    if not isinstance(x0, Tensor):
        raise TypeError(f"x0 must be a tensor, not {type(x0).__name__}.")
    if x0.shape != b.shape or x0.device != b.device:
        raise ValueError(
            f"x0 must have the shape {tuple(b.shape)} of b, on {b.device}, "
            f"but has shape {tuple(x0.shape)} on {x0.device}."
        )
    if x0.dtype != b.dtype:
        raise TypeError(f"x0 must be {b.dtype}, like b, but is {x0.dtype}.")


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


def _finite_peaks(b: Tensor, x0: Tensor | None, r: Tensor) -> tuple[float, float]:
    """The largest |b_i| and |r_i| of r = b − A x0, or an error that names what is not finite."""
    if x0 is None:
        (b_peak,) = _numbers(b.abs().amax())
        r_peak = x0_peak = b_peak
    else:
        b_peak, x0_peak, r_peak = _numbers(b.abs().amax(), x0.abs().amax(), r.abs().amax())
    for name, peak in (("b", b_peak), ("x0", x0_peak)):
        if not math.isfinite(peak):
            raise ValueError(f"{name} has numbers that are not finite: max |{name}| is {peak}.")
    if not math.isfinite(r_peak):
        raise RuntimeError(
            f"A returned numbers that are not finite for x0: max |b − A x0| is {r_peak}."
        )
    return b_peak, r_peak


def _check_progress(k: int, Ap: Tensor, Ap_norm: float, rz: float) -> None:
    """Raise if A or M cannot be what they should, from what iteration k computed."""
    if math.isnan(rz) or rz <= 0:
        raise ValueError(
            f"M must be symmetric positive definite, but rᵀMr is {rz} at iteration {k}, with r ≠ 0."
        )
    if not math.isfinite(Ap_norm):
        cause = (
            f"the norm of A(p) overflows {Ap.dtype}: scale A down"
            if torch.isfinite(Ap).all()
            else "A returned numbers that are not finite"
        )
        raise RuntimeError(f"At iteration {k}, {cause}.")


@dataclass(frozen=True)
class Solve:
    """What one block's system took in the last step of `CGNOptimizer`.

    Attributes:
        names: The parameters of the block.
        products: How many curvature products the solve used.
        reason: Why it stopped, see `CGResult`.
        residuals: The residual norms ‖(C + λI) v + g‖, from v = 0 on.
    """

    names: tuple[str, ...]
    products: int
    reason: Reason
    residuals: tuple[float, ...]


@dataclass(frozen=True)
class _Block:
    """Parameters that are solved for together, and one product `[V, n] → [V, n]` over them."""

    parameters: tuple[Tensor, ...]
    groups: tuple[dict[str, Any], ...]
    names: tuple[str, ...]
    product: Product


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
        maxiter: The most CG iterations per block and step; `None` means the size of the block.
        tol: CG stops when ‖(C + λI) v + g‖ ≤ max(tol · ‖g‖, atol).
        atol: See `tol`; in the units of the gradient.
        weight_decay: μ of an exact penalty ½ μ‖x‖²: adds μx to g and μI to C.
        negative_curvature: What CG does where C + λI is not positive definite, `"stop"` or
            `"ignore"`, see `cg`.

    Attributes:
        bp_extension: As given.
        solves: What the solves of the last step did, one `Solve` per block.

    Raises:
        TypeError: `bp_extension` has no `savefield`.
        ValueError: A hyperparameter is out of range.

    Note:
        The product on a parameter p is a function `[V, *p.shape] → [V, *p.shape]` that multiplies
        each of V vectors. For a block of several parameters, all of them carry one and the same
        function `[V, n] → [V, n]` with an attribute `parameters`, in whose order the n numbers are
        concatenated. Tolerances must agree within a block; damping and lr act per parameter.

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
    ) -> None:
        self.bp_extension = bp_extension
        self.solves: list[Solve] = []
        defaults = {
            "lr": lr,
            "damping": damping,
            "maxiter": maxiter,
            "tol": tol,
            "atol": atol,
            "weight_decay": weight_decay,
            "negative_curvature": negative_curvature,
        }
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Solve for every block's Newton step, then move every parameter by it.

        Args:
            closure: Evaluates the model, calls `backward()` so that gradients and products are
                there, and returns the loss.

        Returns:
            What the closure returned.

        Raises:
            RuntimeError: A parameter has a gradient, but no curvature product, or its system cannot
                be solved (numbers that are not finite, wrong shapes or dtypes). The message names
                the parameter. Nothing has been changed then.
            ValueError: The tolerances of the parameters of a block differ.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        blocks = self._blocks()
        results = [self._solve(block) for block in blocks]
        for block, result in zip(blocks, results, strict=True):
            for p, group, v in zip(
                block.parameters, block.groups, _split(result.x, block), strict=True
            ):
                p.add_(v, alpha=group["lr"])
                delattr(p, self._savefield)  # frees what the product holds on to
        self.solves = [
            Solve(block.names, result.products, result.reason, result.residuals)
            for block, result in zip(blocks, results, strict=True)
        ]
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with hyperparameters of its own where the dictionary has them.

        Args:
            param_group: `{"params": …}` and any of the constructor's hyperparameters.

        Raises:
            ValueError: A hyperparameter is out of range.
        """
        settings = self.defaults | param_group
        for name in ("lr", "damping", "weight_decay"):
            if not 0 <= settings[name] < math.inf:
                raise ValueError(f"{name} must be finite and at least 0, but is {settings[name]}.")
        _check_options(**{name: settings[name] for name in _SOLVE_OPTIONS})
        super().add_param_group(param_group)

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

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_savefield": self._savefield}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_bp_extension", None)  # BackPACK's extensions do not pickle
        self.__dict__.setdefault("solves", [])

    def __deepcopy__(self, memo: dict[int, Any]) -> CGNOptimizer:
        clone = self.__class__.__new__(self.__class__)
        memo[id(self)] = clone
        clone.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        clone._bp_extension = self._bp_extension
        return clone

    def _solve(self, block: _Block) -> CGResult:
        """Solve (C + λI) v = −g for one block, with v and g flattened to n numbers."""
        groups = block.groups
        lam = _per_number([group["damping"] + group["weight_decay"] for group in groups], block)
        try:
            g = _flat(
                p.grad.add(p, alpha=group["weight_decay"]) if group["weight_decay"] else p.grad
                for p, group in zip(block.parameters, groups, strict=True)
                if p.grad is not None
            )
            return cg(
                lambda v: block.product(v.unsqueeze(0)).squeeze(0) + lam * v,
                -g,
                **{name: groups[0][name] for name in _SOLVE_OPTIONS},
            )
        except Exception as error:  # products may raise anything
            raise RuntimeError(
                f"No Newton step for {', '.join(block.names)}: solving A v = b, with A = C + λI "
                f"and b = −gradient, failed: {str(error).rstrip('.')}. No parameter has been "
                "changed; optimizer.zero_grad() and the next batch go on from here."
            ) from error

    def _blocks(self) -> list[_Block]:
        """The blocks of all parameters with a gradient, in the order of their first parameters."""
        groups = {p: group for group in self.param_groups for p in group["params"]}
        names = self._names()
        blocks: list[_Block] = []
        seen: set[Tensor] = set()
        for p in groups:
            if p.grad is None or not p.requires_grad or p in seen:
                continue
            product = getattr(p, self._savefield, None)
            if product is None:
                raise RuntimeError(
                    f"{names[p]} has a gradient, but no curvature product .{self._savefield}: call "
                    "loss.backward() inside `with backpack(optimizer.bp_extension):`, or, for "
                    "products by autograd, optimizer.bp_extension.backward(loss, outputs). A "
                    "product serves one step. Nothing has been changed."
                )
            block = self._block(p, product, groups, names)
            blocks.append(block)
            seen.update(block.parameters)
        return blocks

    def _block(
        self,
        p: Tensor,
        product: Any,
        groups: dict[Tensor, dict[str, Any]],
        names: dict[Tensor, str],
    ) -> _Block:
        """The block of p, after checking that the optimizer can solve for all its parameters."""
        members = tuple(getattr(product, "parameters", (p,)))
        for member in members:
            if member not in groups:
                fault = "this optimizer does not hold"
            elif member.grad is None:
                fault = "has no gradient"
            elif getattr(member, self._savefield, None) != product:
                fault = "does not carry the block's product"
            else:
                continue
            name = names.get(member, f"a parameter of shape {tuple(member.shape)}")
            raise RuntimeError(
                f"The block of {names[p]} contains {name}, which {fault}: form the blocks of the "
                "parameters that it trains. Nothing has been changed."
            )
        block = _Block(
            members,
            tuple(groups[member] for member in members),
            tuple(names[member] for member in members),
            partial(_applied, "The curvature product", product)
            if hasattr(product, "parameters")
            else _flat_product(product, p.shape),
        )
        for option in _SOLVE_OPTIONS:
            values = {group[option] for group in block.groups}
            if len(values) > 1:
                raise ValueError(
                    f"{option} must agree within a block, but is {sorted(values, key=str)} for "
                    f"{', '.join(block.names)}. Nothing has been changed."
                )
        return block

    def _names(self) -> dict[Tensor, str]:
        """What to call each parameter in a message: its name, if the optimizer was given names."""
        return {
            p: name or f"parameter {i} of group {j} (shape {tuple(p.shape)})"
            for j, group in enumerate(self.param_groups)
            for i, (p, name) in enumerate(
                zip(
                    group["params"],
                    group.get("param_names") or [""] * len(group["params"]),
                    strict=True,
                )
            )
        }


_SOLVE_OPTIONS = ("maxiter", "tol", "atol", "negative_curvature")


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    """All the numbers of the tensors, one after another, shape `[n]`."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _split(v: Tensor, block: _Block) -> list[Tensor]:
    """The inverse of `_flat`: views of v in the shapes of the block's parameters."""
    parts = v.split([p.numel() for p in block.parameters])
    return [part.view_as(p) for part, p in zip(parts, block.parameters, strict=True)]


def _per_number(values: list[float], block: _Block) -> Tensor | float:
    """One value for each of a block's n numbers, or a single one where all parameters agree."""
    if len(set(values)) == 1:
        return values[0]
    return torch.cat(
        [p.new_full((p.numel(),), value) for p, value in zip(block.parameters, values, strict=True)]
    )


def _flat_product(product: Product, shape: torch.Size) -> Product:
    """A product on flattened vectors, `[V, n] → [V, n]`, from one on tensors, `[V, *shape]`."""

    def flat_product(v: Tensor) -> Tensor:
        return _applied("The curvature product", product, v.view(-1, *shape)).reshape(v.shape)

    return flat_product
