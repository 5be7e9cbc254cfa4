"""What happens when `CGNOptimizer` is used wrongly, row by row of docs/misuse.rst.

The wrong numbers are tested by the page itself, which shows them.
"""

from __future__ import annotations

import copy
import doctest
import io
import math
import re
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from backpack import backpack, extend
from backpack.extensions import GGNMP, HMP, PCHMP
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call
from torch.nn.functional import mse_loss
from torch.nn.utils import parametrizations, prune
from trials import AUTOGRAD, BACKPACK, LAYERS, MATRICES, reference, verdict

from cgn_tutorial import GGN, CGNOptimizer, Hessian
from cgn_tutorial.curvature import restrict

PAGE = Path(__file__).parents[1] / "docs" / "misuse.rst"

X, Y = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)
LOSS = extend(nn.MSELoss())

MODIFIED = "output of MSELoss.* seems to have been modified"  # BackPACK's warning

# Whose products a test is about, in the words of the page.
PRODUCTS = {"BackPACK": ["BackPACK"], "autograd": ["autograd"], "both": ["BackPACK", "autograd"]}
backpack_alone, autograd_alone, both = (
    pytest.mark.parametrize("products", products) for products in PRODUCTS.values()
)
both_matrices = pytest.mark.parametrize("matrix", ["GGN", "Hessian"])


class Session:
    """A model w x with the loss 5/2 w², at w = 1; an undamped Newton step of length 1 ends at 0."""

    def __init__(
        self, products: str, *layers: nn.Module, matrix: str = "GGN", **options: object
    ) -> None:
        self.model = nn.Sequential(*layers or [nn.Linear(1, 1, bias=False)])
        for p in self.model.parameters():
            nn.init.ones_(p)
        self.autograd = products == "autograd"
        if self.autograd:
            curvature = {"GGN": GGN, "Hessian": Hessian}[matrix](self.model.parameters())
            self.loss_function = nn.MSELoss()
        else:
            extend(self.model)
            curvature = {"GGN": GGNMP(), "Hessian": HMP(), "PCH": PCHMP()}[matrix]
            self.loss_function = LOSS
        options = {"lr": 1.0, "damping": 0.0, "tol": 1e-6} | options
        self.optimizer = CGNOptimizer(self.model.parameters(), curvature, **options)

    def loss(self, x: Tensor = X, y: Tensor = Y) -> Tensor:
        """The mean squared error of a batch."""
        self.outputs = self.model(x)
        return self.loss_function(self.outputs, y)

    def backward(self, loss: Tensor | None = None) -> None:
        """Leave gradients and products of the loss, by default that of the batch X."""
        loss = self.loss() if loss is None else loss
        if self.autograd:
            self.optimizer.bp_extension.backward(loss, self.outputs)
        else:
            with backpack(self.optimizer.bp_extension):
                loss.backward()

    def weights(self) -> list[float]:
        """All weights."""
        return [w for p in self.model.parameters() for w in p.flatten().tolist()]

    def step(self) -> float:
        """The first weight after a step."""
        self.optimizer.step()
        return self.weights()[0]

    def refuses(
        self, error: type[Exception], message: str, loss: Callable[[], Tensor] | None = None
    ) -> None:
        """Assert that a step, or with a loss the way to it, raises and leaves all weights alone."""

        def way() -> None:
            if loss is not None:
                self.backward(loss())
            self.step()

        before = self.weights()
        with pytest.raises(error, match=message):
            way()
        assert self.weights() == before
        self.optimizer.zero_grad()

    def has_the_curvature_of(self, x: Tensor) -> None:
        """Assert that the products are those of the dense matrix, the batch taken as a whole."""
        torch.manual_seed(0)
        for p in self.model.double().parameters():
            nn.init.normal_(p)
        y = torch.randn(len(x), 1).double()
        self.backward(self.loss(x, y))
        parameters = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        savefield = self.optimizer.bp_extension.savefield
        blocks = []
        for p in self.model.parameters():
            v = torch.eye(p.numel()).double()
            v = v if self.autograd else v.view(-1, *p.shape)
            blocks.append(getattr(p, savefield)(v).view(p.numel(), -1))
        for block, (name, p) in zip(blocks, parameters.items(), strict=True):

            def outputs(q: Tensor, name: str = name) -> Tensor:
                return functional_call(self.model, parameters | {name: q}, x)

            if "ggn" in savefield:
                J = jacobian(outputs, p).view(len(x), -1)
                expected = 2 / len(x) * J.T @ J
            else:
                expected = hessian(lambda q, z=outputs: mse_loss(z(q), y), p).view_as(block)
            torch.testing.assert_close(block, expected, rtol=1e-10, atol=1e-12)


@pytest.fixture
def session(products: str) -> Session:
    return Session(products)


@backpack_alone
def test_step_works_inside_and_outside_the_context(session):
    inside = Session("BackPACK")
    session.backward()
    with backpack(inside.optimizer.bp_extension):
        inside.loss().backward()
        inside.optimizer.step()
    assert session.step() == inside.weights()[0] == 0.0


@both
def test_plain_backward_raises(session):
    session.loss().backward()
    session.refuses(RuntimeError, r"no curvature product \.ggn\w+: call loss.backward")


@both
def test_second_step_on_one_product_raises(session):
    session.backward()
    session.step()
    session.refuses(RuntimeError, "A product serves one step")


@backpack_alone
def test_plain_backward_on_an_unused_product_raises(session):
    session.backward()
    session.optimizer.zero_grad()
    session.loss().backward()
    session.refuses(RuntimeError, "No Newton step for parameter 0 .*input0")


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch.compile looks at it
@autograd_alone
def test_compiled_loss_raises(session):
    session.loss_function = torch.compile(nn.MSELoss(), backend="aot_eager")
    session.refuses(RuntimeError, "what torch.compile made", session.loss)


@autograd_alone
def test_forward_in_between_works(session):
    session.backward()
    session.model(2 * X)
    assert session.step() == 0.0


@both
def test_forward_without_gradients_in_between_works(session):
    session.backward()
    with torch.no_grad():
        session.model(2 * X)
    assert session.step() == 0.0


@backpack_alone
@pytest.mark.parametrize("size", [1, 3])
def test_forward_of_the_model_with_another_batch_size_in_between_raises(session, size):
    session.backward()
    session.model(torch.ones(size, 1))
    session.refuses(RuntimeError, "No Newton step for parameter 0 .* do not match")


@autograd_alone
@pytest.mark.parametrize("what", ["inputs", "weights"])
def test_change_in_place_raises(products, what):
    session = Session(products, *(nn.Linear(1, 1, bias=False) for _ in "ab"))
    x = X.clone()
    session.backward(session.loss(x))
    with torch.no_grad():
        (x if what == "inputs" else session.model[1].weight).mul_(2)
    session.refuses(RuntimeError, "changed by an inplace operation")


@autograd_alone
def test_scaled_loss_scales_gradients_and_products(products):
    weights = []
    for scale in (1, 4):
        session = Session(products, damping=2.0 * scale)
        session.backward(scale * session.loss())
        weights.append(session.step())
    assert weights == pytest.approx([2 / 7, 2 / 7])


@both
def test_gradient_scaler_raises(session):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    session.backward(scaler.scale(session.loss()))
    with pytest.raises(RuntimeError, match="compute gradients and products from the loss itself"):
        scaler.step(session.optimizer)
    assert session.weights() == [1.0]
    session.optimizer.zero_grad()
    session.backward()  # of the loss itself, as the message says
    assert session.step() == 0.0


@backpack_alone
def test_autocast_raises(products):
    session = Session(products, nn.Linear(1, 1), nn.Sigmoid(), nn.Linear(1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        loss = session.loss()
    session.refuses(RuntimeError, "No Newton step .* BFloat16", lambda: loss)


@autograd_alone
def test_autocast_works(products):
    weights = []
    for enabled in (True, False):
        session = Session(products, nn.Linear(1, 1), nn.Sigmoid(), nn.Linear(1, 1), damping=0.1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = session.loss()
        session.backward(loss)
        session.step()
        weights.append(session.weights())
    assert weights[0] != weights[1]
    assert weights[0] == pytest.approx(weights[1], rel=0.01)


@autograd_alone
def test_penalty_outside_the_outputs_raises(session):
    penalty = 2.5 * session.model[0].weight.square().sum()
    session.refuses(
        ValueError, "use the optimizer's weight_decay", lambda: session.loss() + penalty
    )


@backpack_alone
def test_module_used_twice_raises(products):
    layer = nn.Linear(1, 1, bias=False)
    session = Session(products, layer, nn.Sigmoid(), layer)
    session.refuses(AssertionError, "expects a backpropagation quantity", session.loss)


@backpack_alone
@pytest.mark.parametrize("layer", [nn.LayerNorm(1), nn.GELU()])
def test_layer_backpack_cannot_take_raises(products, layer):
    session = Session(products, nn.Linear(1, 1), layer)
    session.refuses(NotImplementedError, "does not have an extension", session.loss)


@backpack_alone
def test_function_between_layers_raises(session):
    loss = LOSS(2 * session.model(X), Y)
    session.refuses(AssertionError, "expects a backpropagation quantity", lambda: loss)


class Doubled(nn.Linear):
    """A linear layer with a function behind it."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@autograd_alone
@pytest.mark.parametrize("case", ["parameter", "module", "layer", "function"])
def test_what_backpack_cannot_take_works(products, case):
    first, second = (Doubled if case == "function" else nn.Linear)(3, 3), nn.Linear(3, 3)
    if case == "parameter":
        second.weight = first.weight
    elif case == "module":
        second = first
    between = nn.GELU() if case == "layer" else nn.Sigmoid()
    session = Session(products, first, between, second, nn.Linear(3, 1))
    session.has_the_curvature_of(torch.randn(6, 3).double())


@backpack_alone
def test_loss_that_is_not_extended_raises(session):
    loss = nn.MSELoss()(session.model(X), Y)
    session.refuses(AssertionError, "quantity but it is None", lambda: loss)


@backpack_alone
@pytest.mark.parametrize("option", [{"weight": torch.tensor([1.0, 2.0])}, {"ignore_index": 1}])
def test_loss_option_backpack_cannot_take_raises(products, option):
    session = Session(products, nn.Linear(1, 2))
    loss = extend(nn.CrossEntropyLoss(**option))(session.model(X), torch.tensor([0, 1]))
    message = f"No Newton step .* Only default {next(iter(option))}"
    session.refuses(RuntimeError, message, lambda: loss)


@both
@both_matrices
def test_batch_norm_in_train_mode_works(products, matrix):
    layers = nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Sigmoid(), nn.Linear(2, 1)
    session = Session(products, *layers, matrix=matrix)
    session.has_the_curvature_of(torch.randn(6, 3).double())


@backpack_alone
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("layer", "matrix"),
    [(nn.BatchNorm2d(1), "GGN"), (nn.BatchNorm2d(1), "Hessian"), (nn.BatchNorm1d(1), "PCH")],
)
def test_batch_norm_backpack_cannot_take_raises(products, layer, matrix, training):
    image = nn.Unflatten(1, (1, 1, 1)) if isinstance(layer, nn.BatchNorm2d) else nn.Flatten()
    layers = nn.Linear(1, 1), image, layer.train(training), nn.Flatten()
    session = Session(products, *layers, matrix=matrix)
    session.refuses(NotImplementedError, "extension for Module .*BatchNorm", session.loss)


@autograd_alone
@both_matrices
def test_batch_norm_of_images_in_train_mode_works(products, matrix):
    layers = nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.Sigmoid(), nn.Flatten(), nn.Linear(8, 1)
    session = Session(products, *layers, matrix=matrix)
    session.has_the_curvature_of(torch.randn(6, 1, 3, 3).double())


@both
def test_empty_batch_moves_nothing(session):
    session.backward(session.loss(X[:0], Y[:0]))
    assert session.step() == 1.0


@both
def test_integer_input_raises(session):
    session.refuses(RuntimeError, "same dtype", lambda: session.loss(X.long()))


@both
def test_mixed_dtypes_raise(session):
    session.refuses(RuntimeError, "same dtype", lambda: session.loss(X.double()))


@both
@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_mixed_devices_raise(session, device):
    session.refuses(RuntimeError, "device", lambda: session.loss(X.to(device)))


@both
def test_nan_batch_in_the_middle_of_training_raises_and_training_goes_on(session):
    session.refuses(
        RuntimeError,
        "b has numbers that are not finite: .* No parameter has been changed",
        lambda: session.loss(math.nan * X),
    )
    session.backward()
    assert session.step() == 0.0


@both
def test_zeroed_gradient_of_a_frozen_parameter_is_passed_over(products):
    session = Session(products, *(nn.Linear(1, 1, bias=False) for _ in "ab"), damping=1.0)
    session.backward()
    session.step()
    frozen, moved = session.weights()
    session.optimizer.zero_grad(set_to_none=False)
    session.model[0].weight.requires_grad_(False)
    session.backward()
    session.step()
    assert session.weights()[0] == frozen
    assert session.weights()[1] != moved


@autograd_alone
def test_outputs_computed_from_one_another_raise(products):
    session = Session(products)

    def loss() -> Tensor:
        loss = session.loss()
        session.outputs = session.outputs, 2 * session.outputs
        return loss + mse_loss(session.outputs[1], Y)

    session.refuses(ValueError, "Output 0, .* another output was computed from it", loss)


@autograd_alone
def test_outputs_in_a_dictionary_work(session):
    loss = session.loss()
    session.outputs = {"loss": loss, "logits": session.outputs, "cache": None}
    session.backward(loss)
    assert session.step() == 0.0


@autograd_alone
def test_outputs_and_loss_that_are_no_tensors_raise(session):
    session.refuses(TypeError, "The loss must be a tensor", lambda: session.loss().item())
    loss = session.loss()
    session.outputs = ["logits"]
    session.refuses(TypeError, "outputs must be .* there is str", lambda: loss)


@both
def test_hook_on_a_parameter_acts_on_the_gradient_alone(session):
    session.model[0].weight.register_hook(lambda g: g / 2)
    session.backward()
    assert session.step() == 0.5


@autograd_alone
def test_hook_that_masks_the_gradient_raises(session):
    session.model[0].weight.register_hook(lambda g: 0 * g)
    session.refuses(RuntimeError, "A hook sets 1 entries .* restrict", session.loss)


def two_weights(products: str) -> Session:
    """A model of two weights, and a batch on which both matter."""
    session = Session(products, nn.Linear(2, 1, bias=False), damping=0.1)
    session.x = torch.tensor([[1.0, 1.0], [1.0, 2.0]])
    return session


@both
def test_restricted_entries_stay(products):
    session = two_weights(products)
    session.backward(session.loss(session.x))
    restrict(session.optimizer.bp_extension, {session.model[0].weight: torch.tensor([[1, 0]])})
    session.step()
    first, second = session.weights()
    assert second == 1.0
    assert first == pytest.approx(1 - 5 / 2.1, rel=1e-4)  # x₁ᵀ(x₁ + x₂) / (x₁ᵀx₁ + λ)


@autograd_alone
def test_pruned_entries_stay(products):
    session = two_weights(products)
    prune.custom_from_mask(session.model[0], "weight", torch.tensor([[1.0, 0.0]]))
    session.backward(session.loss(session.x))
    session.step()
    first, second = session.weights()
    assert second == 1.0
    assert first == pytest.approx(1 - 2 / 2.1, rel=1e-4)  # x₁ᵀx₁ / (x₁ᵀx₁ + λ)


@autograd_alone
def test_hook_on_the_outputs_raises(session):
    loss = session.loss()
    session.outputs.register_hook(lambda g: g / 2)
    session.refuses(ValueError, "has a hook, which would act on products", lambda: loss)


def weight_norm(products: str, matrix: str) -> Session:
    return Session(products, parametrizations.weight_norm(nn.Linear(1, 1)), matrix=matrix)


@autograd_alone
def test_hessian_of_weight_norm_raises(products):
    session = weight_norm(products, "Hessian")
    session.refuses(RuntimeError, "cannot differentiate weight_norm twice", session.loss)


@autograd_alone
def test_ggn_of_weight_norm_works(products):
    (case,) = (case for case in LAYERS if case.name == "`weight_norm`")
    assert verdict(case, "GGN").right


class NumPy(torch.autograd.Function):
    """The third power, with a backward pass in NumPy, or none."""

    @staticmethod
    def forward(ctx, x, gradient=True):
        ctx.save_for_backward(x)
        ctx.gradient = gradient
        return x**3

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        dx = 3 * x.detach().numpy() ** 2 * g.detach().numpy()
        return (torch.from_numpy(dx) if ctx.gradient else None), None


class SparseWeight(nn.Linear):
    """A layer whose weight is the values of a sparse matrix."""

    def forward(self, x: Tensor) -> Tensor:
        place = torch.zeros(2, 1, dtype=torch.long)
        weight = torch.sparse_coo_tensor(place, self.weight[0], (1, 1), check_invariants=False)
        return torch.sparse.mm(weight, x.T).T


class Cubed(nn.Linear):
    """A layer behind which the third power is taken."""

    gradient = True

    def forward(self, x: Tensor) -> Tensor:
        return NumPy.apply(super().forward(x), self.gradient)


@autograd_alone
@both_matrices
@pytest.mark.parametrize("layer", [SparseWeight, Cubed])
def test_gradient_computed_outside_of_autograd_raises(products, matrix, layer):
    session = Session(products, layer(1, 1, bias=False), matrix=matrix)
    session.refuses(RuntimeError, "Autograd cannot see the curvature", session.loss)


@autograd_alone
@both_matrices
def test_custom_function_without_a_gradient_works(products, matrix):
    behind = Cubed(1, 1, bias=False)
    behind.gradient = False
    session = Session(products, behind, nn.Linear(1, 1, bias=False), matrix=matrix)
    session.backward()
    product = getattr(behind.weight, session.optimizer.bp_extension.savefield)
    assert product(torch.ones(1, 1)).item() == behind.weight.grad.item() == 0.0
    del behind.weight.grad  # an undamped step on it would be 0 / 0
    session.step()
    assert session.weights() == [1.0, 0.0]


@autograd_alone
def test_hessian_of_a_norm_at_zero_raises(products):
    session = Session(products, matrix="Hessian")
    session.refuses(
        RuntimeError,
        "A root has no second derivative at 0.*1e-12",
        lambda: session.loss() + (session.model[0].weight - 1).norm(),
    )


@autograd_alone
@pytest.mark.parametrize("loss", [nn.CTCLoss, nn.MultiMarginLoss, nn.MultiLabelMarginLoss])
def test_loss_without_second_derivatives_raises(products, loss):
    session = Session(products, nn.Linear(1, 2))
    session.outputs = session.model(X)
    if loss is nn.CTCLoss:
        targets = torch.ones(1, 1).long(), torch.tensor([2]), torch.tensor([1])
        number = loss()(session.outputs.log_softmax(1)[:, None], *targets)
    else:
        targets = torch.tensor([0, 1] if loss is nn.MultiMarginLoss else [[0, -1], [1, -1]])
        number = loss()(session.outputs, targets)
    session.refuses(RuntimeError, "twice: this is so for CTC.* Take another loss", lambda: number)


@autograd_alone
def test_several_dtypes_in_one_block_work(products):
    below, above = nn.Linear(1, 1), nn.Linear(1, 1).double()
    parameters = [*below.parameters(), *above.parameters()]
    for block in (parameters, parameters[::-1]):
        z = above(below(X).double())
        (product,) = GGN([block]).backward(mse_loss(z, Y.double()), z)
        assert product(torch.ones(1, 4).double()).dtype == torch.double


@autograd_alone
def test_sparse_gradients_raise(products):
    session = Session(products, nn.Embedding(2, 1, sparse=True))
    session.refuses(
        RuntimeError, "is sparse.*sparse=False", lambda: session.loss(torch.arange(2), Y)
    )


@both
def test_complex_parameters_raise(products):
    with pytest.raises(TypeError, match="must be real"):
        Session(products, nn.Linear(1, 1, dtype=torch.complex64))


@both
def test_several_processes_raise(session, monkeypatch):
    session.backward()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    session.refuses(RuntimeError, r"torch\.distributed runs several.*whole_batch")


@autograd_alone
def test_kept_product_works_after_the_next_backward_pass(session):
    session.backward()
    kept = session.model[0].weight.ggn_product
    session.backward(session.loss(2 * X))
    assert kept(torch.ones(1, 1)).item() == 5.0


@both
def test_dropout_in_train_mode_works(products):
    (case,) = (case for case in LAYERS if case.name == "Dropout, train")
    (without,) = (case for case in LAYERS if case.name == "Dropout, eval")
    columns = AUTOGRAD if products == "autograd" else BACKPACK
    for column in columns:
        assert verdict(case, column).right
        assert not verdict(case, column, reference(without, MATRICES[column])).right


@backpack_alone
def test_modules_hold_on_to_a_batch_until_the_next(session):
    x = X.clone()
    held = weakref.ref(x)
    session.backward(session.loss(x))
    del x
    session.step()
    assert held() is not None
    session.loss()
    assert held() is None


@autograd_alone
def test_step_lets_go_of_the_batch(session):
    x = X.clone()
    held = weakref.ref(x)
    session.backward(session.loss(x))
    del x, session.outputs
    assert held() is not None
    session.step()
    assert held() is None


@backpack_alone
def test_copy_before_the_first_forward_pass_works(session):
    session.model = copy.deepcopy(session.model)
    session.optimizer = CGNOptimizer(session.model.parameters(), GGNMP(), lr=1.0, damping=0.0)
    session.backward()
    assert session.step() == 0.0


@backpack_alone
def test_copy_after_a_forward_pass_raises(session):
    session.backward()
    session.step()
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(session.model)
    fresh = Session("BackPACK")
    fresh.model.load_state_dict(session.model.state_dict())
    assert fresh.weights() == session.weights() == [0.0]


@autograd_alone
def test_copy_at_any_time_works(session):
    session.backward()
    model = copy.deepcopy(session.model)
    assert session.step() == 0.0
    assert model[0].weight.item() == 1.0
    assert not hasattr(model[0].weight, "ggn_product")


@autograd_alone
def test_copy_of_a_model_and_its_curvature_works(session):
    session.backward()
    model, curvature = copy.deepcopy((session.model, session.optimizer.bp_extension))
    assert session.step() == 0.0
    z = model(X)
    (product,) = curvature.backward(mse_loss(z, Y), z)
    assert product.parameters == (model[0].weight,)
    assert product(torch.ones(1, 1)).item() == 5.0


@both
def test_saving_a_model_with_products_raises(session):
    session.backward()
    with pytest.raises(AttributeError, match="pickle"):
        torch.save(session.model, io.BytesIO())
    session.step()


@both
def test_saving_a_state_dict_or_after_a_step_works(session):
    session.backward()
    file = io.BytesIO()
    torch.save(session.model.state_dict(), file)
    file.seek(0)
    assert torch.load(file)["0.weight"].item() == 1.0
    session.step()
    file = io.BytesIO()
    torch.save(session.model, file)
    file.seek(0)
    assert torch.load(file, weights_only=False)[0].weight.item() == 0.0


# The page.


@pytest.mark.filterwarnings(f"ignore:.*{MODIFIED}", "ignore:`torch.jit.* is deprecated")
def test_page_shows_the_numbers_it_computes():
    result = doctest.testfile(str(PAGE), module_relative=False, encoding="utf-8")
    assert result.attempted > 0
    assert result.failed == 0


def test_page_has_a_row_for_each_test_and_each_wrong_number():
    page = PAGE.read_text(encoding="utf-8")
    named, sections = {}, set()
    for case, products, outcome, check in rows(page, columns=4)[1:]:
        assert not case.lower().startswith("the same")
        if outcome.startswith("**wrong number**"):
            sections.add(re.fullmatch(r"`(.+)`_", check)[1])
        else:
            assert case not in named
            named[re.fullmatch("`(.+)`", check)[1]] = PRODUCTS[products]
    tests = {
        name: next(mark.args[1] for mark in test.pytestmark if mark.args[0] == "products")
        for name, test in globals().items()
        if name.startswith("test_") and "_page_" not in name
    }
    assert named == tests
    sections |= set(re.findall(r"`(.+)`_$", table_of_options(page), re.MULTILINE))
    assert sections == set(re.findall(r"^(.+)\n~+$", page, re.MULTILINE))


OTHERS = "optimizer", "damping", "cg", "preconditioner", "jacobian"


def test_page_names_tests_of_options_that_exist():
    table = rows(table_of_options(PAGE.read_text(encoding="utf-8")), columns=3)[1:]
    named = {check.strip("`") for *_, check in table if check.startswith("`test_")}
    files = [Path(__file__).with_name(f"test_{name}.py") for name in OTHERS]
    sources = "".join(file.read_text(encoding="utf-8") for file in files)
    tests = set(re.findall(r"^def (test_\w+)", sources, re.MULTILINE))
    assert len(named) > 20
    assert named <= tests


def table_of_options(page: str) -> str:
    """The section with the tests of other files."""
    return re.search(r"\nOptions and solves\n-+\n(.+?)\n\n\w[^\n]+\n---", page, re.DOTALL)[1]


def rows(page: str, columns: int) -> list[tuple[str, ...]]:
    """The rows of all tables with so many columns."""
    row = r"^   \* - (.+)\n" + r"     - (.+)\n" * (columns - 1) + r"(?!     )"
    return re.findall(row, page + "\n", re.MULTILINE)
