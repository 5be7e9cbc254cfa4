"""Curvature–vector products by automatic differentiation, in one file to copy.

For a loss L(θ) = ℓ(z(θ)) of a model's outputs z, the file offers two matrices:

    the generalized Gauss–Newton      G = Jᵀ (∂²ℓ/∂z²) J,        J = ∂z/∂θ
    the Hessian                       H = ∂²L/∂θ²

G leaves out the curvature of the model. G is positive semi-definite if ℓ is convex in z, as the
usual losses are; H need not be. Choose `GGN` to train. Choose `Hessian` to see the whole curvature,
or for a solver that stops at negative curvature.

Both take any model and loss that torch can differentiate twice. The file needs nothing but PyTorch.
`CGNOptimizer` takes the products, and so does any code that multiplies vectors by a curvature.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

__all__ = [
    "GGN",
    "BlockProduct",
    "Curvature",
    "Extension",
    "Hessian",
    "Product",
    "check_products",
    "layers",
    "restrict",
]

Tensors = Sequence[Tensor]
Carry = Callable[[Tensor], Tensor]
Multiply = Callable[[Tensors, Tensors], Tensors]  # (block, v) ↦ C v, or J v
Outputs = Tensor | Tensors | Mapping[str, Any]


class Extension(Protocol):
    """An object whose backward pass leaves products on parameters, such as a `GGN`, or your own.

    Attributes:
        savefield: The name of the attribute that carries a parameter's product after a backward
            pass: a `Product`, or a function over this parameter alone, as BackPACK leaves it.
    """

    savefield: str


class Product(Protocol):
    """The product of vectors with a block of the curvature matrix, over several parameters.

    All parameters of the block carry the same product. A function without `parameters`, such as
    BackPACK's, is a product over the one parameter p that carries the function, from and to shape
    `[V, *p.shape]`.

    Attributes:
        parameters: The parameters of the block. Their n numbers, concatenated in this order, are
            the unknowns of the block's system.
    """

    @property
    def parameters(self) -> Tensors: ...  # noqa: D102

    def __call__(self, v: Tensor, /) -> Tensor:
        """Multiply each of the V rows of v, `[V, n] → [V, n]`."""


def layers(model: nn.Module) -> list[list[Tensor]]:
    """One block per layer: the parameters that a module holds itself, not through a submodule.

    If several modules share a parameter, the parameter belongs to the first module.

    Example:
        >>> [len(block) for block in layers(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.PReLU()))]
        [2, 1]
    """
    own: dict[str, list[Tensor]] = {}
    for name, p in model.named_parameters():
        own.setdefault(name.rpartition(".")[0], []).append(p)
    return list(own.values())


@dataclass(frozen=True, eq=False)
class BlockProduct:
    """The product of one diagonal block of a curvature matrix with vectors, `[V, n] → [V, n]`.

    A product keeps the graph of the loss alive. The product is valid until a tensor of the graph,
    such as a parameter, is changed in place.

    Attributes:
        parameters: The parameters of the block. Their n numbers are concatenated in this order.

    Example:
        >>> model = nn.Linear(2, 3)
        >>> z = model(torch.randn(8, 2))
        >>> (product,) = GGN([model.parameters()]).backward(z.square().mean(), z)
        >>> product(torch.eye(9)).shape
        torch.Size([9, 9])
    """

    parameters: tuple[Tensor, ...]
    _multiply: Multiply
    _check: Callable[[Tensors], None] = lambda block: None

    @torch.no_grad()
    def __call__(self, v: Tensor) -> Tensor:
        """Multiply each of the V rows of v.

        Raises:
            TypeError: v does not have the dtype of the parameters, or the widest of their dtypes.
            ValueError: v does not have shape `[V, n]`.
            RuntimeError: The graph has been changed or freed, or torch cannot differentiate an
                operation of the graph twice; the message names the operation and the remedy. Or v
                is finite, and the product is not.
        """
        sizes = [p.numel() for p in self.parameters]
        if v.ndim != 2 or v.shape[1] != sum(sizes):
            raise ValueError(f"v must have shape [V, {sum(sizes)}], but has {list(v.shape)}.")
        if v.dtype != (dtype := _dtype(self.parameters)):
            raise TypeError(f"v must be {dtype}, like its block, not {v.dtype}.")
        Cv = torch.empty_like(v)
        for v_i, Cv_i in zip(v, Cv, strict=True):
            try:
                with _without_hooks(self.parameters):
                    products = self._multiply(self.parameters, _parts(v_i, self.parameters))
            except RuntimeError as error:
                raise RuntimeError(_explanation(str(error))) from error
            Cv_i.copy_(torch.cat([product.reshape(-1) for product in products]))
        # On another device, this check would wait; there, cg finds the numbers, but no remedy.
        if Cv.is_cpu and not Cv.isfinite().all() and v.isfinite().all():
            raise RuntimeError(_NOT_FINITE)
        return Cv


class Curvature:
    """What `GGN` and `Hessian` share: the blocks, and the backward pass that leaves the products.

    Args:
        blocks: The parameters of each diagonal block of the curvature matrix:
            `model.parameters()` for a block per parameter, `layers(model)` for a block per layer,
            `[model.parameters()]` for one block, or any list of lists of parameters.

    Attributes:
        blocks: As given, each a tuple of parameters.
        savefield: The name of the attribute that carries each parameter's product.

    Raises:
        TypeError: A block contains something other than real tensors.
        ValueError: There are no blocks, a block is empty, or blocks overlap.
    """

    savefield: str

    def __init__(self, blocks: Iterable[Tensor | Iterable[Tensor]]) -> None:
        self.blocks: list[tuple[Tensor, ...]] = []
        owner: dict[Tensor, int] = {}
        for i, block in enumerate(blocks):
            if not isinstance(block, Iterable):
                raise TypeError(_NO_PARAMETER.format(i, type(block).__name__))
            self.blocks.append((block,) if isinstance(block, Tensor) else tuple(block))
            if not self.blocks[i]:
                raise ValueError(f"Block {i} is empty.")
            for p in self.blocks[i]:
                if not isinstance(p, Tensor):
                    raise TypeError(_NO_PARAMETER.format(i, type(p).__name__))
                if p.is_complex():
                    raise TypeError(
                        f"Parameters must be real, but block {i} contains one of shape "
                        f"{list(p.shape)} that is {p.dtype}: train torch.view_as_real of it."
                    )
                if p in owner:
                    raise ValueError(
                        f"Blocks must not overlap, but block {i} contains a parameter of shape "
                        f"{list(p.shape)} that is already in block {owner[p]}."
                    )
                owner[p] = i
        if not self.blocks:
            raise ValueError("There are no blocks: the iterator of parameters is empty or used up.")
        self._checked = False

    def backward(self, loss: Tensor, outputs: Outputs = ()) -> list[BlockProduct]:
        """Do what `loss.backward()` does, and leave each block's product on its parameters.

        Like `loss.backward()`, this method adds gradients to `.grad` of every leaf that the loss
        depends on, in a block or not, and runs the hooks of the leaves, which may average gradients
        over processes. Hooks of leaves never act on products: products are those of the loss. Hooks
        of modules and of other tensors act on every pass. If such a hook changes a tensor, the hook
        changes the products.

        Parameters without a gradient, such as frozen parameters, get no product: their blocks
        shrink. New products replace earlier products. The graph lives as long as the products, the
        loss or the outputs; the optimizer's `step()` deletes the products.

        The first call checks, by one more pass, that autograd sees how the loss depends on the
        parameters: for v along the gradient g, gᵀv must equal uᵀJv, with u and J as in `GGN`.

        Args:
            loss: The loss, a single number.
            outputs: The outputs z that the loss was computed from: a tensor of any shape, or
                several tensors, none computed from another. Of a mapping, the tensors that require
                a gradient count. `GGN` needs outputs, `Hessian` does not.

        Returns:
            The products, one per block.

        Raises:
            TypeError: The loss or an output is not a tensor.
            ValueError: The loss is not a single number, or depends on no parameter of the blocks.
                For `GGN`: the loss depends on a leaf besides the outputs, or an output depends on
                another output, or an output has a hook.
            RuntimeError: A gradient is sparse, or was computed outside autograd; or torch.compile
                made a part of the graph; or torch has a wrong second derivative of an operation. Or
                a hook of a parameter set entries of the parameter's gradient to zero, see
                `restrict`: gradients were added, and there are no products.
        """
        gradients, multiply, u, jvp = self._differentiate(_number(loss), _tensors(outputs))
        blocks = [tuple(p for p in block if p in gradients) for block in self.blocks]
        if not any(blocks):
            raise ValueError(
                "The loss depends on no parameter of the blocks: were they formed from another "
                "model, or frozen?"
            )
        for p, g in gradients.items():
            if g.layout != torch.strided:
                raise RuntimeError(
                    f"The gradient of a parameter of shape {list(p.shape)} is sparse, and torch "
                    "cannot differentiate it again: use a layer with sparse=False."
                )
        members = [p for block in blocks for p in block]
        for p in members:  # a gradient Jᵀu that is not zero depends on u
            if not gradients[p].requires_grad and gradients[p].count_nonzero():
                raise RuntimeError(_UNSEEN.format(f"a parameter of shape {list(p.shape)}"))

        def check(block: Tensors) -> None:
            _check_seen(loss, {p: gradients[p] for p in block}, u, jvp)

        if not self._checked:
            check(members)
            self._checked = True
        hooked = [p for p in members if p._backward_hooks or p._post_accumulate_grad_hooks]
        before = [None if p.grad is None else p.grad.clone() for p in hooked]
        # Copies, since torch keeps its argument as .grad, and the products need the gradients.
        copies = [g.detach().clone() for g in gradients.values()]
        torch.autograd.backward(list(gradients), copies)
        for p in (p for block in self.blocks for p in block if hasattr(p, self.savefield)):
            delattr(p, self.savefield)
        for p, old in zip(hooked, before, strict=True):
            _check_hooks(p, gradients[p], old)
        products = [BlockProduct(block, multiply, check) for block in blocks if block]
        for product in products:
            for p in product.parameters:
                setattr(p, self.savefield, product)
        return products

    def _differentiate(self, loss: Tensor, z: Tensors) -> _Derivatives:
        """Compute gradients and what the products need."""
        raise NotImplementedError


class _Derivatives(NamedTuple):
    """The gradients Jᵀu of all leaves; for any block of leaves, the products with C and with J."""

    gradients: dict[Tensor, Tensor]
    multiply: Multiply
    u: Tensors
    jvp: Multiply


# How far uᵀJv may be from gᵀv, relative to the lengths: half precision (autocast) needs this.
SEEN = 0.05


class GGN(Curvature):
    """The generalized Gauss–Newton matrix G = Jᵀ (∂²ℓ/∂z²) J, in diagonal blocks.

    With s = ∂ℓ/∂z and any u like z, one backward pass computes Jᵀu and records a graph of Jᵀu. At
    u = s, Jᵀu is the gradient. Jᵀu is linear in u, so that its derivative by u is Jᵀ. Thus

        w = J v = (∂(Jᵀu)/∂u)ᵀ v,        G v = Jᵀ (∂s/∂z) w = (∂s/∂θ)ᵀ w

    take two passes through the network from the block to the loss, which cost about as much as a
    forward and a backward pass.

    The loss must depend on the parameters through the outputs only: for a penalty ½ μ‖θ‖², use the
    optimizer's `weight_decay`. G depends on the choice of the outputs: take a tensor in which the
    loss is convex, as cross-entropy is in the logits.

    Example:
        >>> from cgn_tutorial.cgn import CGNOptimizer
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.GELU(), nn.Flatten())
        >>> curvature = GGN(layers(model))
        >>> optimizer = CGNOptimizer(model.parameters(), curvature)
        >>> inputs, targets = torch.randn(8, 1, 4, 4), torch.randint(8, (8,))
        >>> for _ in range(5):
        ...     optimizer.zero_grad()
        ...     outputs = model(inputs)
        ...     loss = nn.functional.cross_entropy(outputs, targets)
        ...     _ = curvature.backward(loss, outputs)
        ...     optimizer.step()

    Source:
        Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent"
        (2002).
    """

    savefield = "ggn_product"

    def _differentiate(self, loss: Tensor, z: Tensors) -> _Derivatives:
        edges = [_edge(z_i) for z_i in z]
        others, met = _leaves([_edge(loss)], set(edges), stop=True)
        if not met:
            raise ValueError(
                "The loss was not computed from these outputs: pass the very tensor that the loss "
                "function took, with its graph."
            )
        for leaf in others:
            raise ValueError(
                f"Besides the outputs, the loss depends on a leaf of shape {list(leaf.shape)}: "
                "name it among the outputs, or use the optimizer's weight_decay for a penalty."
            )
        leaves, met = _leaves(edges, set(edges), twice=False)
        for i, (z_i, edge) in enumerate(zip(z, edges, strict=True)):
            if edge in met or edges.index(edge) < i:
                raise ValueError(
                    f"Output {i}, of shape {list(z_i.shape)}, is named twice, or another output "
                    "was computed from it: let the loss take a copy of this one, h.clone(), and "
                    "name the copy."
                )
            if z_i._backward_hooks:
                raise ValueError(
                    f"Output {i}, of shape {list(z_i.shape)}, has a hook, which would act on "
                    "products as well: register it on the parameters."
                )
        points = {p: _points(p, users) for p, users in leaves.items()}

        s = _pullback([loss], z, [torch.ones_like(loss)], create_graph=True)
        u = [s_i.detach().requires_grad_() for s_i in s]
        x = [*leaves, *(point for way in points.values() for point, _ in way)]
        with _without_hooks(leaves):
            Jtu = iter(_pullback(z, x, u, create_graph=True))
        gradients = {p: next(Jtu) for p in leaves}
        ways = {p: [(next(Jtu), carry) for _, carry in way] for p, way in points.items()}

        def jvp(block: Tensors, v: Tensors) -> Tensors:
            pairs = [(g, carry(x)) for p, x in zip(block, v, strict=True) for g, carry in ways[p]]
            return _pullback([g for g, _ in pairs], u, [t for _, t in pairs])

        def multiply(block: Tensors, v: Tensors) -> Tensors:
            return _pullback(s, block, jvp(block, v))

        return _Derivatives(gradients, multiply, u, jvp)


class Hessian(Curvature):
    """The Hessian H = ∂²L/∂θ², in diagonal blocks.

    A backward pass computes the gradient g = ∂L/∂θ and records a graph of g. Then

        H v = (∂g/∂θ)ᵀ v.

    H is indefinite in general: keep the optimizer's `negative_curvature="stop"`. The loss may
    depend on the parameters in any way.

    Source:
        Pearlmutter, "Fast exact multiplication by the Hessian" (1994).
    """

    savefield = "hessian_product"

    def _differentiate(self, loss: Tensor, z: Tensors) -> _Derivatives:
        leaves = list(_leaves([_edge(loss)])[0])
        u = [torch.ones_like(loss, requires_grad=True)]
        with _without_hooks(leaves):
            g = _pullback([loss], leaves, u, create_graph=True)
        gradients = dict(zip(leaves, g, strict=True))

        def multiply(block: Tensors, v: Tensors) -> Tensors:
            return _pullback([gradients[p] for p in block], block, v)

        def jvp(block: Tensors, v: Tensors) -> Tensors:
            return _pullback([gradients[p] for p in block], u, v)

        return _Derivatives(gradients, multiply, u, jvp)


def restrict(extension: Any, masks: Mapping[Tensor, Tensor]) -> None:
    """Keep some entries of parameters: the next step solves for the other entries only.

    With P = diag(mask), P g replaces the gradient g, and P C P replaces the curvature C. The step
    is 0 for entries of mask 0, and Newton's step in the other entries. (To mask the gradient alone
    is not enough: C mixes the entries.) Call this function after each backward pass, and before
    `whole_batch` and `step()`. A `weight_decay` still acts on all entries.

    Args:
        extension: The extension that left the products, such as a `GGN`, or BackPACK's `GGNMP()`.
        masks: For each parameter to restrict, a tensor of its shape: 1 moves an entry, 0 keeps an
            entry. Parameters without a gradient are skipped.

    Raises:
        ValueError: A mask has another shape, or other numbers than 0 and 1.
        RuntimeError: A parameter has a gradient, but no product. Nothing has been changed.

    Example:
        >>> from cgn_tutorial.cgn import CGNOptimizer
        >>> model = nn.Linear(3, 2)
        >>> curvature = GGN([model.parameters()])
        >>> optimizer = CGNOptimizer(model.parameters(), curvature)
        >>> mask, before = torch.tensor([[1, 0, 1], [0, 1, 1]]), model.weight.detach().clone()
        >>> z = model(torch.randn(8, 3))
        >>> _ = curvature.backward(z.square().mean(), z)
        >>> restrict(curvature, {model.weight: mask})
        >>> optimizer.step()
        >>> (model.weight == before).int()
        tensor([[0, 1, 0],
                [1, 0, 0]], dtype=torch.int32)
    """
    masks = {p: mask for p, mask in masks.items() if p.grad is not None}
    for p, mask in masks.items():
        if mask.shape != p.shape or not ((mask == 0) | (mask == 1)).all():
            raise ValueError(
                f"A mask for a parameter of shape {list(p.shape)} must have this shape and consist "
                f"of 0 and 1, but has shape {list(mask.shape)} and {mask.unique().tolist()[:4]}."
            )
        if not hasattr(p, extension.savefield):
            raise RuntimeError(
                f"A parameter of shape {list(p.shape)} has a gradient, but no curvature product "
                f".{extension.savefield} to restrict: call restrict() between the backward pass "
                "and step()."
            )
    for p, mask in masks.items():
        product = getattr(p, extension.savefield)
        members = getattr(product, "parameters", None)
        P = mask.to(p.dtype)
        if members is not None:
            parts = [P if q is p else torch.ones_like(q) for q in members]
            P = torch.cat([part.detach().reshape(-1) for part in parts])
        restricted = partial(lambda v, product, P: P * product(P * v), product=product, P=P)
        if members is not None:
            restricted.__dict__["parameters"] = members
        for q in members or [p]:
            setattr(q, extension.savefield, restricted)
        if p.grad is not None:
            p.grad.mul_(mask)


def check_products(
    products: Iterable[Product],
    *,
    positive: bool = False,
    probes: int = 3,
    evaluate: Callable[[], Any] | None = None,
) -> float:
    """Check curvature products, before `step()`.

    For random vectors u and v, a symmetric C has uᵀCv = vᵀCu, and a positive semi-definite C has
    uᵀCu ≥ 0. A product that fails either test is wrong; a product that passes may still be wrong.
    With `evaluate`, C v is also compared with central differences. They need first derivatives
    only, and they find any wrong product,

        H v ≈ (g(θ + hv) − g(θ − hv)) / 2h,      G v ≈ Jᵀ (s(θ + hv) − s(θ − hv)) / 2h,

    with the gradient g and s = ∂ℓ/∂z. Check each new model, loss or extension: some second
    derivatives of torch are wrong. The check changes nothing: parameters, buffers of modules and
    the global random generator of torch are as before, bit for bit.

    Args:
        products: Products over blocks: what `curvature.backward` returns, or `optimizer.blocks()`.
        positive: Whether C must be positive semi-definite, as the GGN of a convex loss is.
        probes: The number of pairs u, v per block. Each pair costs two products.
        evaluate: Computes the loss of the products again, with the same batch, mode and dropout
            (set a seed). To check products of the Hessian, `evaluate` returns the loss; to check
            products of the GGN, `evaluate` returns `(loss, outputs)`.

    Returns:
        The largest `|uᵀCv − vᵀCu|`, relative to the mean of ‖Cu‖ and ‖Cv‖.

    Raises:
        TypeError: A product does not name its parameters.
        ValueError: There are no products.
        RuntimeError: A product is not symmetric, or not positive, to half of the dtype's digits; or
            C v is too far from the central differences: by more than 2 ∛ε of their length, with the
            dtype's ε (1 % in float32, 10⁻⁵ in float64), and by more than three times the distance
            between the differences for two h. The message names the parameters.

    Note:
        Central differences are accurate in float64 for smooth models. The gradient of a model with
        kinks, such as ReLU's, jumps: its Hessian may pass though wrong, above all in float32.
    """
    products = list(products)
    if not products:
        raise ValueError("There are no products to check: call this between backward and step().")
    probed: list[tuple[str, Tensors, Tensor, Tensor]] = []
    worst = 0.0
    for product in products:
        if not hasattr(product, "parameters"):
            raise TypeError(
                f"A product must name its parameters, but {type(product).__name__} does not: for "
                "products of BackPACK, check optimizer.blocks()."
            )
        block = product.parameters
        shapes = [f"a parameter of shape {list(p.shape)}" for p in block]
        name = f"The curvature product of {', '.join(getattr(product, 'names', shapes))}"
        if isinstance(product, BlockProduct):
            product._check(block)
        dtype, device = _dtype(block), block[0].device
        tolerance = torch.finfo(dtype).eps ** 0.5
        random = torch.Generator(device).manual_seed(0)
        for _ in range(probes):
            n = sum(p.numel() for p in block)
            uv = torch.randn(2, n, generator=random, device=device, dtype=dtype)
            Cuv = product(uv)
            (uCu, uCv), (vCu, _) = (uv @ Cuv.T).tolist()
            size = float(Cuv.norm(dim=1).mean())
            gap = abs(uCv - vCu) / size if size else 0.0
            if not gap <= tolerance:
                raise RuntimeError(
                    f"{name} is not symmetric: uᵀCv = {uCv:.6g}, but vᵀCu = {vCu:.6g}. Every "
                    "curvature is symmetric. For the Hessian, find the operation whose second "
                    "derivative is wrong, and write it out in elementary operations."
                )
            if positive and uCu < -tolerance * size:
                raise RuntimeError(
                    f"{name} is not positive semi-definite: uᵀCu = {uCu:.6g}. Is the loss convex "
                    "in the outputs?"
                )
            worst = max(worst, gap)
            probed.append((name, block, uv[0], Cuv[0]))
    if evaluate is not None:  # after all products: BackPACK's use the last inputs of modules
        for name, block, v, Cv in probed:
            _check_differences(name, block, v, Cv, evaluate)
    return worst


def _check_differences(
    name: str, block: Tensors, v: Tensor, Cv: Tensor, evaluate: Callable[[], Any]
) -> None:
    """Raise unless the product C v agrees with central differences."""
    h = torch.finfo(v.dtype).eps ** (1 / 3)
    x = torch.cat([p.detach().reshape(-1) for p in block])
    size = max(float(x.double().square().mean()) ** 0.5, 0.01)  # a typical number in x
    found: list[Tensor] = []
    kink = math.inf  # the gap between one-sided differences, which at a kink no h closes
    for smaller in (1, 8, 64):
        difference, bend = _differences(block, v, h * size / smaller, evaluate)
        found.append(difference)
        kink = min(kink, _norm(bend))
        error, length = _norm(Cv - found[-1]), _norm(found[-1])
        if error <= 2 * h * length:
            return
    doubts = [_norm(a - b) for a, b in pairwise(found)]
    doubt, C = min(zip(doubts, found[1:], strict=True), key=lambda pair: pair[0])
    error, length = _norm(Cv - C), _norm(C)
    if not error <= 2 * h * length + 3 * doubt + kink:
        raise RuntimeError(
            f"{name} is wrong: C v is {_norm(Cv):.4g} long, the central differences of "
            f"evaluate() {length:.4g}, and they are {error:.4g} apart. Does evaluate() repeat the "
            "loss of the products, with their batch, mode and dropout, and return the loss alone "
            "for the Hessian, (loss, outputs) for the GGN? If so, find the operation whose "
            "derivative is wrong, and write it out in elementary operations."
        )


def _differences(
    block: Tensors, v: Tensor, h: float, evaluate: Callable[[], Any]
) -> tuple[Tensor, Tensor]:
    """C v by central differences, and the gap between the two one-sided differences."""
    start = [p.detach().clone() for p in block]
    slopes: list[list[Tensor]] = []
    try:
        for t in (h, -h, 0.0):  # 0 for J, and to leave modules their old inputs
            for p, x, v_p in zip(block, start, _parts(v, block), strict=True):
                p.data.copy_(x + t * v_p)  # .data keeps the products valid
            with _undisturbed(block), torch.enable_grad():
                result = evaluate()
                loss, z = result if isinstance(result, tuple) else (result, None)
                y = block if z is None else _tensors(z)
                with _without_hooks(block):
                    slopes.append(_pullback([_number(loss)], y, [torch.ones_like(loss)]))
    finally:
        for p, x in zip(block, start, strict=True):
            p.data.copy_(x)
    central = [(above - below) / (2 * h) for above, below, _ in zip(*slopes, strict=True)]
    bend = [(above - 2 * at + below) / h for above, below, at in zip(*slopes, strict=True)]
    if z is not None:
        with _without_hooks(block):
            central, bend = (_pullback(y, block, w) for w in (central, bend))
    flat = [torch.cat([w_p.reshape(-1).to(v.dtype) for w_p in w]) for w in (central, bend)]
    return flat[0], flat[1]


@contextmanager
def _undisturbed(block: Tensors) -> Iterator[None]:
    """Restore, at the end, the buffers of all modules that ran, and the random generators."""
    kept: dict[tuple[nn.Module, str], tuple[Tensor, Tensor]] = {}

    def keep(module: nn.Module, _: Any) -> None:
        for m in module.modules():
            for name, b in m._buffers.items():
                if b is not None:
                    kept.setdefault((m, name), (b, b.clone()))

    hook = nn.modules.module.register_module_forward_pre_hook(keep)
    devices = {p.device for p in block if p.is_cuda}
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        hook.remove()
        for (module, name), (b, value) in kept.items():
            b.data.copy_(value)
            module._buffers[name] = b


def _pullback(y: Tensors, x: Sequence[Any], v: Tensors, create_graph: bool = False) -> list[Tensor]:
    """(∂y/∂x)ᵀ v, one tensor for each x_i; zero if y does not depend on x_i."""
    pairs = [(y_i, v_i) for y_i, v_i in zip(y, v, strict=True) if y_i.requires_grad]
    products: Sequence[Tensor | None] = [None] * len(x)
    if pairs:
        ys, vs = zip(*pairs, strict=True)
        products = torch.autograd.grad(
            ys, x, vs, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
    return [
        # For an edge of the graph, a zero of any shape will do: no pass goes through a constant.
        (torch.zeros_like(x_i) if isinstance(x_i, Tensor) else torch.zeros(()))
        if product is None
        else product
        for product, x_i in zip(products, x, strict=True)
    ]


@contextmanager
def _without_hooks(leaves: Iterable[Tensor]) -> Iterator[None]:
    """Switch off the hooks of these leaves, which are for the pass of the gradient alone."""
    # torch runs the hooks in this dictionary whenever a pass ends at the leaf.
    hooks = [(p._backward_hooks, dict(p._backward_hooks)) for p in leaves if p._backward_hooks]
    for live, _ in hooks:
        live.clear()
    try:
        yield
    finally:
        for live, kept in hooks:
            live.update(kept)


Edge = tuple[Any, int]  # an operation of the graph, and which of its inputs or outputs


def _edge(y: Tensor) -> Edge:
    """The edge at which a backward pass from y enters the graph."""
    node, i, *_ = get_gradient_edge(y)
    return node, i


def _leaves(
    starts: Iterable[Edge],
    outputs: Collection[Edge] = (),
    *,
    stop: bool = False,
    twice: bool = True,
) -> tuple[dict[Tensor, list[Edge]], set[Edge]]:
    """Walk the graph from its starts: the leaves reached, each with its users, and the outputs met.

    With `stop`, the walk ends at outputs. Raise at an operation if torch differentiates its
    backward pass wrongly: by the incoming gradient, or, if `twice`, by its saved tensors.
    """
    todo: list[tuple[Edge, Edge]] = [(edge, (None, 0)) for edge in starts]
    leaves: dict[Tensor, list[Edge]] = {}
    met: set[Edge] = set()
    seen = {None}
    while todo:
        edge, user = todo.pop()
        node = edge[0]
        if edge in outputs and (stop or user[0] is not None):
            met.add(edge)
            if stop:
                continue
        if type(node).__name__ == "AccumulateGrad":
            leaves.setdefault(node.variable, []).append(user)
        elif node not in seen:
            name = node.name()
            if remedy := _WRONG.get(name) or (twice and _WRONG_TWICE.get(name)):
                raise RuntimeError(f"Torch cannot differentiate {remedy}.")
            seen.add(node)
            todo += [(inner, (node, i)) for i, inner in enumerate(node.next_functions)]
    return leaves, met


def _points(p: Tensor, users: list[Edge]) -> list[tuple[Any, Carry]]:
    """The points of the graph where p acts, and functions that carry a change of p to them."""
    # A change of the kernel of a convolution also changes the gradient of its input. Torch computes
    # the latter change by a slow transposed convolution, which no product needs. So we carry the
    # change of the kernel to the convolution's output. (A change of the input likewise changes the
    # gradient of the kernel: each convolution above the block still computes that change.)
    if all(
        node is not None and (node.name(), i) == ("ConvolutionBackward0", 1) for node, i in users
    ):
        return [(GradientEdge(node, 0), partial(_convolve, node)) for node, _ in users]
    return [(p, lambda v: v)]


def _convolve(node: Any, v: Tensor) -> Tensor:
    """The convolution at a node of the graph, with the kernel v and no bias."""
    names = "stride", "padding", "dilation", "transposed", "output_padding", "groups"
    options = [getattr(node, f"_saved_{name}") for name in names]
    return torch.convolution(node._saved_input, v, None, *options)


def _number(loss: Any) -> Tensor:
    """The loss. Raise unless the loss is a single number with a graph."""
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"The loss must be a tensor, not {type(loss).__name__}: pass it with its graph, not "
            "loss.item()."
        )
    if loss.numel() != 1:
        raise ValueError(f"The loss must be a single number, but has shape {list(loss.shape)}.")
    if not loss.requires_grad:
        raise ValueError(
            "The loss depends on nothing that requires a gradient: was the model evaluated "
            "under no_grad, or its output detached?"
        )
    return loss


def _tensors(outputs: Any) -> list[Tensor]:
    """The outputs that require a gradient."""
    if isinstance(outputs, Mapping):
        outputs = [z for z in outputs.values() if isinstance(z, Tensor) and z.ndim]
    z = [outputs] if isinstance(outputs, Tensor) else outputs
    wrong = [z] if not isinstance(z, Iterable) else [x for x in z if not isinstance(x, Tensor)]
    for x in wrong:
        raise TypeError(
            "The outputs must be a tensor, several, or a mapping of names to tensors, but there is "
            f"{type(x).__name__}: pass the very tensors that the loss took, such as outputs.logits."
        )
    return [z_i for z_i in z if z_i.requires_grad]


def _norm(x: Tensor) -> float:
    """‖x‖."""
    return float(x.double().norm())


def _dtype(block: Tensors) -> torch.dtype:
    """The dtype of a vector that holds all numbers of the block."""
    return reduce(torch.promote_types, [p.dtype for p in block])


def _parts(v: Tensor, block: Tensors) -> list[Tensor]:
    """The n numbers v as new tensors, in the shapes and dtypes of the block's parameters."""
    # torch.view_as_complex, for one, refuses a view with an odd offset.
    parts = zip(v.split([p.numel() for p in block]), block, strict=True)
    return [part.view_as(p).to(p.dtype, copy=True) for part, p in parts]


def _check_seen(loss: Tensor, gradients: dict[Tensor, Tensor], u: Tensors, jvp: Multiply) -> None:
    """Raise if uᵀJv is not gᵀv, for v = g / ‖g‖ with each gradient g."""
    rounding = torch.finfo(loss.dtype).eps ** 0.5 * abs(float(loss.detach()))

    def seen(block: Tensors) -> bool:
        g = [gradients[p].detach() for p in block]
        norms = [_norm(g_p) for g_p in g]
        v = [g_p / (norm or 1.0) for g_p, norm in zip(g, norms, strict=True)]
        try:
            with _without_hooks(block), torch.no_grad():
                w = jvp(block, v)
        except RuntimeError:
            return True  # the same error comes from the product, with a remedy
        pairs = [(u_i.detach().double(), w_i.double()) for u_i, w_i in zip(u, w, strict=True)]
        gv, uw = sum(norms), sum(float((u_i * w_i).sum()) for u_i, w_i in pairs)
        lengths = [math.hypot(*(_norm(x) for x in xs)) for xs in zip(*pairs, strict=True)]
        bound = SEEN * (gv + math.prod(lengths)) + rounding
        return not abs(gv - uw) > bound  # NaN passes, since step() finds it

    if not seen(list(gradients)):
        faulty = [p for p in gradients if not seen([p])] or gradients
        shapes = " and ".join(str(list(p.shape)) for p in faulty)
        raise RuntimeError(_UNSEEN.format(f"parameters of shape {shapes}"))


def _check_hooks(p: Tensor, g: Tensor, old: Tensor | None) -> None:
    """Raise if hooks of p have set entries of p.grad, which is `old` plus the gradient g, to 0."""
    if p.grad is None:
        return
    # Entries below the normal numbers do not count: division makes them 0, too.
    masked = (g.abs() > torch.finfo(g.dtype).tiny) & (p.grad == 0)
    count = int((masked if old is None else masked & (old == 0)).sum())
    if count:
        raise RuntimeError(
            f"A hook sets {count} entries of the gradient of a parameter of shape {list(p.shape)} "
            "to zero, but a Newton step moves them all the same, since curvature mixes entries. "
            "Remove the hook and call restrict(curvature, {p: mask}) after backward(), or use "
            "torch.nn.utils.prune; for a whole parameter, p.requires_grad_(False)."
        )


_NO_PARAMETER = (
    "Block {} must consist of parameters, but contains {}: use model.parameters() or layers(model)."
)
_NOT_FINITE = (
    "The product has numbers that are not finite. A root has no second derivative at 0: write "
    "(x.square().sum() + 1e-12).sqrt() in place of x.norm(), and so for any other root. If there "
    "is none, numbers overflow."
)
_UNSEEN = (
    "Autograd cannot see the curvature of {}: a gradient is computed outside of autograd, as by "
    "NumPy in a custom autograd.Function, by detach() in its backward, or by sparse_coo_tensor of "
    "trained values. Write the operation in torch, a sparse matrix by index_put or to_dense."
)
_WRONG = {  # torch may return a second derivative of zero in place of an error
    "CompiledFunctionBackward": "what torch.compile made twice: use the model and the loss that "
    "were not compiled",
}
_WRONG_TWICE = {
    "WeightNormInterfaceBackward0": "weight_norm twice: its result is wrong, and not even "
    "symmetric. Take the GGN, or write the weight out, g * v / v.norm()",
}
_TWICE = "torch cannot differentiate {} twice: "
_EXPLANATIONS = {
    r"derivative for '?([\w:]*attention\w*)'? is not implemented": _TWICE
    + "evaluate the model within torch.nn.attention.sdpa_kernel(SDPBackend.MATH).",
    r"derivative for '?([\w:]*cudnn_rnn\w*)'? is not implemented": _TWICE
    + "evaluate the model within torch.backends.cudnn.flags(enabled=False).",
    r"derivative for '?([\w:]*(?:ctc|margin)_loss\w*)'? is not implemented": _TWICE
    + "this is so for CTC, multi_margin_loss and multilabel_margin_loss. Take another loss, or "
    "write this one out, as CTC's recursion in torch.logsumexp.",
    r"derivative for '?([\w:]+)'? is not implemented": _TWICE
    + "write it in terms of operations that it can.",
    r"modified by an (inplace operation)": "a tensor of the graph was changed by an {} after "
    "backward(): products serve until the parameters move, so evaluate the model again.",
    r"backward through the (graph a second time)": "the graph is freed, so there is no going "
    "backward through the {}: call curvature.backward(loss, outputs) in place of loss.backward().",
}


def _explanation(message: str) -> str:
    """The meaning of an error of torch for a curvature product, and the remedy."""
    for pattern, explanation in _EXPLANATIONS.items():
        if match := re.search(pattern, message):
            explained = explanation.format(match[1])
            return explained[0].upper() + explained[1:]
    return message
