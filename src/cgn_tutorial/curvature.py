"""Curvature–vector products by automatic differentiation, in one file to copy.

For a loss L(θ) = ℓ(z(θ)) of a model's outputs z, there are two matrices to choose from:

    the generalized Gauss–Newton      G = Jᵀ (∂²ℓ/∂z²) J,        J = ∂z/∂θ
    the Hessian                       H = ∂²L/∂θ²

G leaves out the curvature of the model itself. It is positive semi-definite wherever ℓ is convex in
z, which holds for the usual losses; H need not be. Choose `GGN` to train, and `Hessian` to see the
curvature as it is, or with a solver that stops where it turns negative.

Both take any model and loss that torch can differentiate twice. The file needs nothing but PyTorch.
`CGNOptimizer` takes its products as they are, and they serve other purposes as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

__all__ = ["GGN", "BlockProduct", "Curvature", "Hessian", "layers"]

Tensors = Sequence[Tensor]
Push = Callable[[Tensor], Tensor]
Multiply = Callable[[Tensors, Tensors], Tensors]  # (block, v) ↦ C v


def layers(model: nn.Module) -> list[list[Tensor]]:
    """One block per layer: the parameters that a module holds itself, not through a submodule.

    A parameter that several modules share belongs to the first.

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

    It holds on to the graph of the loss, and serves until a tensor of that graph, such as a
    parameter, is changed in place.

    Attributes:
        parameters: The parameters of the block, whose n numbers are concatenated in this order.

    Example:
        >>> model = nn.Linear(2, 3)
        >>> z = model(torch.randn(8, 2))
        >>> (product,) = GGN([model.parameters()]).backward(z.square().mean(), z)
        >>> product(torch.eye(9)).shape
        torch.Size([9, 9])
    """

    parameters: tuple[Tensor, ...]
    _multiply: Multiply

    @torch.no_grad()
    def __call__(self, v: Tensor) -> Tensor:
        """Multiply each of the V rows of v.

        Raises:
            TypeError: v differs in dtype from the parameters.
            ValueError: v does not have shape `[V, n]`.
            RuntimeError: The graph has been changed or freed, or contains an operation that torch
                cannot differentiate twice. The message names it, and the remedy.
        """
        sizes = [p.numel() for p in self.parameters]
        if v.ndim != 2 or v.shape[1] != sum(sizes):
            raise ValueError(f"v must have shape [V, {sum(sizes)}], but has {list(v.shape)}.")
        if v.dtype != self.parameters[0].dtype:
            raise TypeError(f"v must be {self.parameters[0].dtype}, like its block, not {v.dtype}.")
        Cv = torch.empty_like(v)
        for v_i, Cv_i in zip(v, Cv, strict=True):
            parts = zip(v_i.split(sizes), self.parameters, strict=True)
            try:
                with _without_hooks(self.parameters):
                    products = self._multiply(self.parameters, [v.view_as(p) for v, p in parts])
            except RuntimeError as error:
                raise RuntimeError(_explanation(str(error))) from error
            Cv_i.copy_(torch.cat([product.reshape(-1) for product in products]))
        return Cv


class Curvature:
    """What `GGN` and `Hessian` share: the blocks, and the backward pass that leaves the products.

    Args:
        blocks: The diagonal blocks of the curvature matrix, each one parameter or several:
            `model.parameters()` for one block per parameter, `layers(model)` for one per layer,
            `[model.parameters()]` for the whole network, or any list of lists of parameters.

    Attributes:
        blocks: As given, each a tuple of parameters.
        savefield: The name of the attribute that carries each parameter's product.

    Raises:
        TypeError: A block contains something else than real tensors.
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

    def backward(self, loss: Tensor, outputs: Tensor | Tensors = ()) -> list[BlockProduct]:
        """Do what `loss.backward()` does, and leave each block's product on its parameters.

        As there, gradients are added to `.grad` of every leaf that the loss depends on, in a block
        or not, and pass through the hooks of the leaves, such as those that average them over
        processes. Products are those of the loss: hooks of leaves never act on them. Hooks of
        modules and of tensors in between act on every pass, and so change products, unless they
        only look.

        Parameters without a gradient, such as frozen ones, get no product: their blocks shrink.
        Products replace earlier ones. The graph lives as long as one of products, loss and outputs;
        the optimizer's `step()` lets go of the products.

        Args:
            loss: The loss, a single number.
            outputs: The outputs z that it was computed from, one tensor of any shape or several,
                none of which was computed from another. `GGN` needs them, `Hessian` does not.

        Returns:
            The products, one per block.

        Raises:
            ValueError: The loss is not a single number, or does not depend on any parameter of the
                blocks. For `GGN`: it depends on something else than the outputs, or one of them on
                another, or an output has a hook.
            RuntimeError: A gradient is sparse, or torch.compile made a part of the graph.
        """
        if loss.numel() != 1:
            raise ValueError(f"The loss must be a single number, but has shape {list(loss.shape)}.")
        if not loss.requires_grad:
            raise ValueError(
                "The loss depends on nothing that requires a gradient: was the model evaluated "
                "under no_grad, or its output detached?"
            )
        z = (outputs,) if isinstance(outputs, Tensor) else outputs
        gradients, multiply = self._differentiate(loss, [z_i for z_i in z if z_i.requires_grad])
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
        # Copies, since torch keeps as .grad what it is given, and the products need theirs.
        copies = [g.detach().clone() for g in gradients.values()]
        torch.autograd.backward(list(gradients), copies)
        for p in (p for block in self.blocks for p in block if hasattr(p, self.savefield)):
            delattr(p, self.savefield)
        products = [BlockProduct(block, multiply) for block in blocks if block]
        for product in products:
            for p in product.parameters:
                setattr(p, self.savefield, product)
        return products

    def _differentiate(self, loss: Tensor, z: Tensors) -> tuple[dict[Tensor, Tensor], Multiply]:
        """The gradient for each leaf, and the product for any block of leaves."""
        raise NotImplementedError


class GGN(Curvature):
    """The generalized Gauss–Newton matrix G = Jᵀ (∂²ℓ/∂z²) J, in diagonal blocks.

    With s = ∂ℓ/∂z and any u like z, one backward pass with a graph of its own computes Jᵀu. At
    u = s it is the gradient; as it is linear in u, its derivative by u multiplies by J. Thus

        w = J v = (∂(Jᵀu)/∂u)ᵀ v,        G v = Jᵀ (∂s/∂z) w = (∂s/∂θ)ᵀ w

    take two passes through the part of the network from the block on to the loss, about as much as
    a forward and a backward pass.

    The loss must depend on the parameters through the outputs only: for a penalty ½ μ‖θ‖², use the
    optimizer's `weight_decay`. Which tensor counts as the outputs matters: take the one in which
    the loss is convex, the logits and not their softmax.

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

    def _differentiate(self, loss: Tensor, z: Tensors) -> tuple[dict[Tensor, Tensor], Multiply]:
        edges = [_edge(z_i) for z_i in z]
        others, met = _leaves([_edge(loss)], edges)
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
        for i, (z_i, edge) in enumerate(zip(z, edges, strict=True)):
            if edge in edges[:i] or _leaves(edge[0].next_functions, edges)[1]:
                raise ValueError(
                    f"Output {i}, of shape {list(z_i.shape)}, was computed from another one, or is "
                    "named twice: let the loss take a copy of that one, h.clone(), and name it."
                )
            if z_i._backward_hooks:
                raise ValueError(
                    f"Output {i}, of shape {list(z_i.shape)}, has a hook, which would act on "
                    "products as well: register it on the parameters."
                )
        leaves, _ = _leaves(edges)
        points = [_points(p, users) for p, users in leaves.items()]

        s = _pullback([loss], z, [torch.ones_like(loss)], create_graph=True)
        u = [s_i.detach().requires_grad_() for s_i in s]
        x = [*leaves, *(point for way in points for point, _ in way)]
        with _without_hooks(leaves):
            Jtu = iter(_pullback(z, x, u, create_graph=True))
        gradients = {p: next(Jtu) for p in leaves}
        ways = {
            p: [(next(Jtu), push) for _, push in way] for p, way in zip(leaves, points, strict=True)
        }

        def multiply(block: Tensors, v: Tensors) -> Tensors:
            pairs = [(g, push(v_p)) for p, v_p in zip(block, v, strict=True) for g, push in ways[p]]
            Jv = _pullback([g for g, _ in pairs], u, [t for _, t in pairs])
            return _pullback(s, block, Jv)

        return gradients, multiply


class Hessian(Curvature):
    """The Hessian H = ∂²L/∂θ², in diagonal blocks.

    With the gradient g = ∂L/∂θ from a backward pass that has a graph of its own,

        H v = (∂g/∂θ)ᵀ v.

    H is indefinite in general: keep the optimizer's `negative_curvature="stop"`. The loss may
    depend on the parameters in any way.

    Source:
        Pearlmutter, "Fast exact multiplication by the Hessian" (1994).
    """

    savefield = "hessian_product"

    def _differentiate(self, loss: Tensor, z: Tensors) -> tuple[dict[Tensor, Tensor], Multiply]:
        leaves = list(_leaves([_edge(loss)])[0])
        with _without_hooks(leaves):
            g = _pullback([loss], leaves, [torch.ones_like(loss)], create_graph=True)
        gradients = dict(zip(leaves, g, strict=True))

        def multiply(block: Tensors, v: Tensors) -> Tensors:
            return _pullback([gradients[p] for p in block], block, v)

        return gradients, multiply


def _pullback(y: Tensors, x: Sequence[Any], v: Tensors, create_graph: bool = False) -> list[Tensor]:
    """(∂y/∂x)ᵀ v, one tensor for each of x, zero where y does not depend on it."""
    pairs = [(y_i, v_i) for y_i, v_i in zip(y, v, strict=True) if y_i.requires_grad]
    products: Sequence[Tensor | None] = [None] * len(x)
    if pairs:
        ys, vs = zip(*pairs, strict=True)
        products = torch.autograd.grad(
            ys, x, vs, retain_graph=True, create_graph=create_graph, allow_unused=True
        )
    return [
        product if product is not None else torch.zeros_like(x_i)
        for product, x_i in zip(products, x, strict=True)
    ]


@contextmanager
def _without_hooks(leaves: Iterable[Tensor]) -> Iterator[None]:
    """Passes that end at these leaves, but leave their hooks to the pass of the gradient."""
    # torch runs a leaf's hooks whenever a pass ends there, and reads them from this dictionary.
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
    """Where a backward pass from y enters the graph."""
    node, i, *_ = get_gradient_edge(y)
    return node, i


def _leaves(
    starts: Iterable[Edge], stop: Sequence[Edge] = ()
) -> tuple[dict[Tensor, list[Edge]], bool]:
    """The leaves that are reached other than through `stop`, their users, and if `stop` was met."""
    todo: list[tuple[Edge, Edge]] = [(edge, (None, 0)) for edge in starts]
    leaves: dict[Tensor, list[Edge]] = {}
    seen = {None}
    met = False
    while todo:
        edge, user = todo.pop()
        node = edge[0]
        if edge in stop:
            met = True
        elif type(node).__name__ == "AccumulateGrad":
            leaves.setdefault(node.variable, []).append(user)
        elif node not in seen:
            if node.name() == "CompiledFunctionBackward":  # some give zero in place of an error
                raise RuntimeError(
                    "Torch cannot differentiate what torch.compile made twice: use the model and "
                    "the loss that were not compiled."
                )
            seen.add(node)
            todo += [(inner, (node, i)) for i, inner in enumerate(node.next_functions)]
    return leaves, met


def _points(p: Tensor, users: list[Edge]) -> list[tuple[Any, Push]]:
    """Points of the graph that p acts through, and how a change of p arrives at each."""
    # For a change of its kernel, torch's second derivative of a convolution also computes what
    # becomes of the gradient of its input, a slow transposed convolution that no product needs. So
    # the change is taken to where the layer ends. (For a change of the input, it also computes what
    # becomes of the gradient of the kernel: each convolution above the block still does that.)
    if all(
        node is not None and (node.name(), i) == ("ConvolutionBackward0", 1) for node, i in users
    ):
        return [(GradientEdge(node, 0), partial(_convolve, node)) for node, _ in users]
    return [(p, lambda v: v)]


def _convolve(node: Any, v: Tensor) -> Tensor:
    """The convolution of a graph with another kernel v, and no bias."""
    names = "stride", "padding", "dilation", "transposed", "output_padding", "groups"
    options = [getattr(node, f"_saved_{name}") for name in names]
    return torch.convolution(node._saved_input, v, None, *options)


_NO_PARAMETER = (
    "Block {} must consist of parameters, but contains {}: use model.parameters() or layers(model)."
)
_TWICE = "torch cannot differentiate {} twice: "
_EXPLANATIONS = {
    r"derivative for '?([\w:]*attention\w*)'? is not implemented": _TWICE
    + "evaluate the model within torch.nn.attention.sdpa_kernel(SDPBackend.MATH).",
    r"derivative for '?([\w:]*cudnn_rnn\w*)'? is not implemented": _TWICE
    + "evaluate the model within torch.backends.cudnn.flags(enabled=False).",
    r"derivative for '?([\w:]+)'? is not implemented": _TWICE
    + "write it in terms of operations that it can.",
    r"modified by an (inplace operation)": "a tensor of the graph was changed by an {} after "
    "backward(): products serve until the parameters move, so evaluate the model again.",
    r"backward through the (graph a second time)": "the graph is freed, so there is no going "
    "backward through the {}: call curvature.backward(loss, outputs) in place of loss.backward().",
}


def _explanation(message: str) -> str:
    """What an error of torch means for a curvature product, and what to do about it."""
    for pattern, explanation in _EXPLANATIONS.items():
        if match := re.search(pattern, message):
            explained = explanation.format(match[1])
            return explained[0].upper() + explained[1:]
    return message
