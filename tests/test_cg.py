"""What `cg` promises."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from systems import KINDS, System, counted_conversions, linear_systems
from torch import Tensor

from cgn_tutorial import cg

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

many_systems = partial(settings, max_examples=300)
# From a wild start, rounding alone leaves more than the bound on the residual.
TAME = {"kinds": ["definite"], "starts": [None, "random", "exact"], "dtypes": (torch.float64,)}


def definite(n: int, decades: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A symmetric positive definite matrix, of condition number 10**decades."""
    random = torch.Generator().manual_seed(n)
    Q = torch.linalg.qr(torch.randn(n, n, generator=random, dtype=torch.float64)).Q
    return (Q * torch.logspace(0, decades, n, dtype=torch.float64) @ Q.T).to(dtype)


def vector(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def iterates(system: System, **options: object) -> tuple[list[Tensor], object]:
    """All iterates of a solve, the starting point included, and its result."""
    xs = [torch.zeros_like(system.b) if system.x0 is None else system.x0]
    result = cg(system.A, system.b, system.x0, callback=xs.append, **options)
    return [*xs, result.x], result


# Properties of every symmetric system.


@pytest.mark.versions
@many_systems()
@given(linear_systems(), st.sampled_from([1e-2, 1e-5]), st.sampled_from([0.0, 1e-8]))
def test_converged_means_that_the_residual_is_within_its_bound(system, tol, atol):
    result = cg(system.A, system.b, system.x0, tol=tol, atol=atol, maxiter=3 * system.b.numel())
    bound = max(tol * system.b.double().norm().item(), atol)
    met = result.solve.residuals[-1] <= bound * (1 + 1e-6)
    assert met if result.solve.converged else not met or result.solve.reason == "maxiter"
    if result.solve.converged:
        assert system.residual(result.x) <= 1.1 * bound + system.rounding([result.x])


@many_systems()
@given(linear_systems(), st.sampled_from(["stop", "ignore"]))
def test_recurrence_follows_the_true_residual(system, negative_curvature):
    xs, result = iterates(system, negative_curvature=negative_curvature, atol=0)
    for x, norm in zip(xs, result.solve.residuals, strict=False):
        assert abs(system.residual(x) - norm) <= system.rounding(xs)


@many_systems()
@given(linear_systems(), st.one_of(st.none(), st.integers(0, 12)))
def test_never_uses_more_products_than_promised(system, maxiter):
    calls = []
    result = cg(
        lambda v: calls.append(v) or system.A(v), system.b, system.x0, maxiter=maxiter, atol=0
    )
    most = 10 * system.b.numel() if maxiter is None else maxiter
    assert result.solve.products == len(calls) <= most + (system.x0 is not None)


@many_systems()
@given(linear_systems())
def test_quadratic_model_never_ends_above_its_start(system):
    xs, result = iterates(system, atol=0)
    largest = max(x.double().norm().item() for x in xs)
    assert system.model(result.x) <= system.rounding(xs) * largest


@many_systems()
@given(linear_systems(), st.sampled_from(["stop", "ignore"]))
def test_model_is_the_value_of_the_quadratic_model(system, negative_curvature):
    xs, result = iterates(system, atol=0, negative_curvature=negative_curvature)
    largest = max(x.double().norm().item() for x in xs)
    assert abs(result.solve.decrease + system.value(result.x)) <= system.rounding(xs) * largest


@many_systems()
@given(linear_systems(starts=[None], scales=(1e-12, 1.0, 1e10)), st.integers(1, 12))
def test_result_is_a_descent_direction_from_zero(system, maxiter):
    x = cg(system.A, system.b, maxiter=maxiter, atol=0).x
    slope = (system.b.double() * x.double()).sum()
    assert slope > 0 or not system.b.any()


@pytest.mark.versions
@many_systems()
@given(linear_systems(), st.sampled_from(["stop", "ignore"]))
def test_never_changes_b_or_x0(system, negative_curvature):
    b, x0 = system.b.clone(), None if system.x0 is None else system.x0.clone()
    x = cg(system.A, system.b, system.x0, negative_curvature=negative_curvature).x
    assert torch.equal(system.b, b)
    assert x is not system.b
    if x0 is not None:
        assert torch.equal(system.x0, x0)
        assert x is not system.x0


@many_systems()
@given(linear_systems(**TAME, condition=100, scales=(1.0,)))
def test_n_steps_suffice_for_n_unknowns(system):
    n = system.b.numel()
    assert cg(system.A, system.b, system.x0, atol=0, maxiter=n).solve.converged


@pytest.mark.versions
@many_systems()
@given(linear_systems(**TAME, condition=1e4, scales=(0.0, 1.0)))
def test_agrees_with_a_direct_solve(system):
    xs, result = iterates(system, tol=1e-9, atol=1e-9, maxiter=10 * system.b.numel())
    assert result.solve.converged
    direct = torch.linalg.solve(system.matrix, system.b.reshape(-1)).view(system.b.shape)
    residual = 1e-9 * max(1, system.b.norm().item()) + system.rounding([*xs, direct])
    largest_inverse = 1 / torch.linalg.eigvalsh(system.matrix).min().item()
    assert (result.x - direct).norm().item() <= largest_inverse * residual


@pytest.mark.versions
@many_systems()
@given(
    linear_systems(**TAME | {"starts": [None, "random"]}, condition=100, scales=(1.0,)),
    st.booleans(),
    st.integers(1, 8),
)
def test_follows_scipy_step_by_step(system, preconditioned, steps):
    n = system.b.numel()
    diagonal = system.matrix.diagonal().view(system.b.shape)
    expected: list[np.ndarray] = []
    scipy.sparse.linalg.cg(
        system.matrix.numpy(),
        system.b.reshape(-1).numpy(),
        None if system.x0 is None else system.x0.reshape(-1).numpy().copy(),
        rtol=1e-4,
        atol=0,
        maxiter=min(steps, n),
        M=np.diag(1 / diagonal.reshape(-1).numpy()) if preconditioned else None,
        callback=lambda x: expected.append(x.copy()),
    )
    xs, result = iterates(
        system,
        M=(lambda v: v / diagonal) if preconditioned else None,
        tol=1e-4,
        atol=0,
        maxiter=min(steps, n),
    )
    assert len(result.solve.residuals) - 1 == len(expected)
    for x, e in zip(xs[1:], expected, strict=False):
        np.testing.assert_allclose(x.reshape(-1), e, rtol=1e-8, atol=1e-8 * np.abs(e).max())


@many_systems()
@given(linear_systems(starts=[None], scales=(1.0,)), st.sampled_from([-24, 24]))
def test_scale_of_b_changes_nothing_else(system, exponent):
    scale = 2.0**exponent  # about 6e-8 and 2e7
    plain = cg(system.A, system.b, atol=0)
    scaled = cg(system.A, system.b * scale, atol=0)
    assert scaled.solve.reason == plain.solve.reason
    assert torch.equal(scaled.x, plain.x * scale)
    assert scaled.solve.residuals == tuple(norm * scale for norm in plain.solve.residuals)


# Single promises.


@pytest.mark.parametrize("start", [None, torch.zeros(3)])
def test_zero_b_costs_nothing_but_the_start(start):
    result = cg(torch.mul, torch.zeros(3)) if start is None else cg(lambda v: 2 * v, start, start)
    assert (result.solve.reason, result.solve.products) == ("converged", 0 if start is None else 1)
    assert not result.x.any()


def test_exact_start_costs_one_product():
    A, x = definite(4), vector(4)
    result = cg(lambda v: A @ v, A @ x, x)
    assert (result.solve.reason, result.solve.products) == ("converged", 1)
    assert torch.equal(result.x, x)


def test_one_iteration_is_one_step_of_steepest_descent():
    A, b = definite(4), vector(4)
    result = cg(lambda v: A @ v, b, maxiter=1)
    torch.testing.assert_close(result.x, b * (b @ b) / (b @ A @ b))
    assert result.solve.products == 1


def test_no_iterations_return_the_start():
    b = vector(4)
    assert not cg(torch.mul, b, maxiter=0).x.any()
    result = cg(lambda v: v, b, 2 * b, maxiter=0)
    assert torch.equal(result.x, 2 * b)
    assert (result.solve.reason, result.solve.products) == ("maxiter", 1)


def test_stops_at_the_first_residual_within_the_larger_of_both_bounds():
    A, b = definite(8), vector(8)
    norms = cg(lambda v: A @ v, b, tol=0, atol=0).solve.residuals
    for k in range(1, 5):
        just = norms[k] * 0.99  # so that their sum would stop a step too early
        result = cg(lambda v: A @ v, b, tol=just / b.norm().item(), atol=just)
        assert result.solve.residuals == norms[: len(result.solve.residuals)]
        assert result.solve.residuals[-1] <= just < min(result.solve.residuals[:-1])
        assert cg(lambda v: A @ v, b, tol=0, atol=norms[k]).solve.residuals[-1] <= norms[k]


def test_callback_sees_every_iterate():
    A, b = definite(5), vector(5)
    seen: list[Tensor] = []
    result = cg(lambda v: A @ v, b, callback=seen.append, tol=1e-3)
    assert len(seen) == result.solve.products == len(result.solve.residuals) - 1
    assert torch.equal(seen[-1], result.x)
    norms = [(b - A @ x).norm().item() for x in seen]
    assert norms == pytest.approx(result.solve.residuals[1:])


@pytest.mark.versions
@pytest.mark.parametrize("shape", [(12,), (3, 4), (2, 3, 2), (3, 1, 4)])
def test_solves_for_any_shape(shape):
    A, b = definite(12), vector(*shape)
    flat = cg(lambda v: A @ v, b.reshape(-1))
    shaped = cg(lambda v: (A @ v.reshape(-1)).view(shape), b)
    assert torch.equal(shaped.x, flat.x.view(shape))


@pytest.mark.versions
@pytest.mark.parametrize(
    "b",
    [
        torch.tensor(3.0),
        torch.ones(2, 3).T,
        torch.ones(1).expand(6),
        torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.empty(0, 3),
    ],
    ids=["0-dim", "transposed", "expanded", "channels last", "empty"],
)
def test_solves_for_any_layout(b):
    result = cg(lambda v: 2 * v, b)
    assert result.solve.converged
    assert result.x.shape == b.shape
    assert torch.equal(result.x, b / 2)


@pytest.mark.versions
@pytest.mark.parametrize("alias", [lambda v: v, lambda v: v[:], lambda v: v.view(v.shape)])
def test_product_may_return_its_argument(alias):
    b = vector(4)
    torch.testing.assert_close(cg(alias, b, torch.ones_like(b), M=alias).x, b)


@pytest.mark.versions
def test_never_tracks_gradients():
    A, b = definite(3).requires_grad_(), vector(3).requires_grad_()
    x0 = torch.zeros_like(b, requires_grad=True)
    seen: list[bool] = []
    result = cg(
        lambda v: A @ v,
        b,
        x0,
        M=lambda v: v * b.detach().exp().requires_grad_(),
        callback=lambda _: seen.append(torch.is_grad_enabled()),
    )
    assert not result.x.requires_grad
    assert seen
    assert not any(seen)


@pytest.mark.versions
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_works_in_the_dtype_and_on_the_device_of_b(dtype, device):
    A, b = definite(6).to(device, dtype), vector(6).to(device, dtype)
    x = cg(lambda v: A @ v, b, tol=0.1).x
    assert (x.dtype, x.device) == (b.dtype, b.device)
    residual = (b.double() - A.double() @ x.double()).norm()
    assert residual <= (0.1 + 60 * torch.finfo(dtype).eps) * b.double().norm()


@pytest.mark.versions
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_have_the_range_of_float32(dtype):
    """Of 300,000 ones, the square of the norm and that of a norm above 255 overflow float16."""
    b = torch.ones(300_000, dtype=dtype)
    assert torch.equal(cg(torch.clone, b).x, b)
    large = torch.full((4,), 300.0, dtype=dtype)
    result = cg(lambda v: v / 4, large)
    assert result.solve.converged
    assert torch.equal(result.x, 4 * large)
    tiny = torch.full((4,), torch.finfo(torch.float16).tiny, dtype=dtype)
    assert torch.equal(cg(lambda v: v * 4, tiny, atol=0).x, tiny / 4)


@pytest.mark.versions
def test_definite_matrices_are_positive_in_bfloat16():
    diagonal = torch.tensor([1.0, 1000.0], dtype=torch.bfloat16)
    b = torch.tensor([1000**0.5, 1.0], dtype=torch.bfloat16)
    result = cg(diagonal.mul, b, tol=0.02)
    assert result.solve.reason == "converged"
    torch.testing.assert_close(result.x, b / diagonal, rtol=0.02, atol=0.002)


def test_without_a_limit_rounding_may_take_more_steps_than_there_are_unknowns():
    eigenvalues = torch.logspace(0, 4, 60, dtype=torch.float64)
    b = torch.ones(60, dtype=torch.float64)
    assert not cg(eigenvalues.mul, b, maxiter=60).solve.converged
    result = cg(eigenvalues.mul, b)
    assert result.solve.converged
    assert 60 < result.solve.products < 600


def test_a_b_whose_squares_underflow_counts_as_zero():
    result = cg(torch.clone, torch.full((3,), 1e-30), atol=0)
    assert (result.solve.reason, result.solve.products) == ("converged", 0)
    assert not result.x.any()


@pytest.mark.parametrize("exponent", [-90, -60, 60])
def test_works_for_any_scale_of_A(exponent):
    A, b, scale = definite(5, dtype=torch.float32), vector(5, dtype=torch.float32), 2.0**exponent
    plain, scaled = cg(lambda v: A @ v, b, atol=0), cg(lambda v: A @ v * scale, b, atol=0)
    assert scaled.solve.reason == "converged"
    torch.testing.assert_close(scaled.x * scale, plain.x)


# The preconditioner.


def test_identity_as_preconditioner_changes_no_bit():
    A, b = definite(8), vector(8)
    plain, preconditioned = cg(lambda v: A @ v, b), cg(lambda v: A @ v, b, M=lambda v: v)
    assert torch.equal(plain.x, preconditioned.x)
    assert plain.solve.residuals == preconditioned.solve.residuals


@pytest.mark.versions
@pytest.mark.parametrize("start", [None, vector(8)])
def test_exact_inverse_as_preconditioner_takes_one_iteration(start):
    A, b = definite(8, decades=6), vector(8)
    inverse = torch.linalg.inv(A)
    result = cg(lambda v: A @ v, b, start, M=lambda v: inverse @ v)
    assert len(result.solve.residuals) == 2
    torch.testing.assert_close(result.x, torch.linalg.solve(A, b))


@pytest.mark.parametrize(
    ("M", "value"),
    [(lambda v: -v, "-"), (lambda v: math.nan * v, "nan")],
    ids=["negative", "nan"],
)
def test_preconditioner_must_be_positive_definite(M, value):
    with pytest.raises(ValueError, match=rf"M must .* rᵀMr is {value}.* at iteration 1"):
        cg(lambda v: 2 * v, vector(4), M=M)


def test_a_preconditioner_that_vanishes_is_a_breakdown_that_returns_the_iterate():
    A, b, xs = definite(40, 3), vector(40), []
    result = cg(
        lambda v: A @ v,
        b,
        M=lambda r: r * (r.norm() > b.norm() / 100),  # as squares that underflow do
        callback=xs.append,
    )
    assert result.solve.reason == "breakdown"
    assert torch.equal(result.x, xs[-1])
    assert (A @ result.x - b).norm() <= b.norm() / 100
    assert torch.equal(cg(lambda v: A @ v, b, M=lambda r: 0 * r).x, torch.zeros(40).double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_preconditioner_in_half_precision_loses_no_solve(dtype):
    A, b = definite(60, 2, torch.float32), 1e-4 * vector(60, dtype=torch.float32)
    diagonal = A.diagonal()

    def M(r: Tensor) -> Tensor:
        return (r.to(dtype) / diagonal.to(dtype)).float()

    result = cg(lambda v: A @ v, b, M=M, tol=1e-6, atol=0)
    assert (A @ result.x - b).norm() < 1e-2 * b.norm()


# Convergence is that of b − A x.


def symmetric(n: int, condition: float, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(n, n, generator=random, dtype=torch.float64)).Q
    return (Q * torch.logspace(0, -math.log10(condition), n, dtype=torch.float64) @ Q.T).float()


def kernel(n: int) -> Tensor:
    x = torch.linspace(0, 1, n)[:, None]
    return torch.exp(-50 * (x - x.T).square()) + 1e-4 * torch.eye(n)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("matrix", "tol"),
    [
        (partial(symmetric, 400, 1e4), 1e-5),
        (partial(symmetric, 400, 1e6), 1e-3),
        (lambda seed: kernel(300), 1e-3),
    ],
    ids=["condition 1e4", "condition 1e6", "kernel"],
)
def test_converged_is_true_of_the_residual_itself_where_scipys_is_not(matrix, tol, seed):
    A = matrix(seed)
    b = torch.randn(len(A), generator=torch.Generator().manual_seed(100 + seed))
    bound = tol * b.norm().double().item()

    def residual(x: Tensor) -> float:
        return (b.double() - A.double() @ x.double()).norm().item()

    ours = cg(lambda v: A @ v, b, tol=tol, atol=0)
    theirs, code = scipy.sparse.linalg.cg(A.numpy(), b.numpy(), rtol=tol, maxiter=4000)
    assert code == 0  # SciPy says that it converged
    assert residual(torch.from_numpy(theirs)) > 5 * bound
    assert not ours.solve.converged or residual(ours.x) <= 1.1 * bound
    assert residual(ours.x) <= 3 * residual(torch.from_numpy(theirs))


@pytest.mark.versions
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [10, 20, 40, 80])
def test_systems_without_a_solution_do_not_converge(n, dtype):
    """Neumann's Laplacian, whose null vectors are constant, and b whose mean is not zero."""
    A = 2 * torch.eye(n, dtype=dtype)
    A -= torch.diag(torch.ones(n - 1, dtype=dtype), 1) + torch.diag(
        torch.ones(n - 1, dtype=dtype), -1
    )
    A[0, 0] = A[-1, -1] = 1
    for seed in range(10):
        b = 10 * torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        for mode in ("stop", "ignore"):
            result = cg(lambda v: A @ v, b, tol=1e-6, atol=0, negative_curvature=mode)
            assert not result.solve.converged


def test_short_solves_cost_no_product_to_be_trusted():
    """As in training: a few iterations to a loose tolerance, on a damped singular matrix."""
    for seed in range(20):
        A = symmetric(100, 1e8, seed) + 1e-3 * torch.eye(100)
        b = torch.randn(100, generator=torch.Generator().manual_seed(seed))
        solve = cg(A.mv, b, tol=0.1).solve
        assert solve.converged
        assert solve.products == len(solve.residuals) - 1


def test_a_callback_that_returns_true_ends_the_solve():
    A, b, seen = definite(20, 2), vector(20), []
    result = cg(lambda v: A @ v, b, callback=lambda x: seen.append(x) or len(seen) == 3)
    assert (result.solve.reason, result.solve.products) == ("maxiter", 3)
    assert torch.equal(result.x, seen[-1])


@pytest.mark.versions
def test_a_and_m_may_differentiate():
    w = torch.linspace(1, 3, 5, dtype=torch.float64)

    def hessian_product(v: Tensor) -> Tensor:
        x = torch.zeros(5, dtype=torch.float64, requires_grad=True)
        (g,) = torch.autograd.grad((w * x.cosh()).sum(), x, create_graph=True)
        return torch.autograd.grad(g, x, v)[0]

    b = vector(5)
    with torch.no_grad():
        result = cg(hessian_product, b, M=lambda r: hessian_product(r) / w.square())
    assert not result.x.requires_grad
    torch.testing.assert_close(result.x, b / w)


@pytest.mark.parametrize("wrong", [{"A": torch.eye(4)}, {"M": torch.eye(4)}], ids=["A", "M"])
def test_a_matrix_in_place_of_a_function_is_refused(wrong):
    options = {"A": torch.neg, "b": vector(4)} | wrong
    with pytest.raises(TypeError, match=r"must be a function of a vector, not Tensor.*lambda v"):
        cg(**options)


# Curvature that is not positive.


def test_negative_curvature_on_the_first_step_returns_b():
    b = vector(4)
    result = cg(torch.neg, b)
    assert torch.equal(result.x, b)
    assert (result.solve.reason, result.solve.products) == ("negative curvature", 1)


def test_negative_curvature_on_the_first_step_returns_x0_and_its_residual():
    b, x0 = vector(4), torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(cg(torch.neg, b, x0).x, x0 + (b + x0))
    torch.testing.assert_close(cg(torch.neg, b, x0, M=lambda v: v / 2).x, x0 + (b + x0) / 2)


def test_negative_curvature_later_returns_the_iterate_reached():
    A = torch.tensor([3.0, 2.0, -0.1])
    b = torch.ones(3)
    stopped = cg(A.mul, b)
    assert stopped.solve.reason == "negative curvature"
    assert stopped.solve.products > 1
    before = cg(A.mul, b, maxiter=stopped.solve.products - 1)
    assert before.solve.reason == "maxiter"
    assert torch.equal(stopped.x, before.x)


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e12])
def test_curvature_is_compared_with_rounding_not_with_zero(scale):
    """On vᵀx = 0, vvᵀ is zero but for rounding, which may come out positive."""
    v = vector(50, dtype=torch.float32)
    for seed in range(20):
        b = torch.randn(50, generator=torch.Generator().manual_seed(seed))
        b -= v * (v @ b) / (v @ v)
        assert cg(lambda u: scale * v * (v @ u), b, atol=0).solve.reason == "negative curvature"


@pytest.mark.versions
@pytest.mark.parametrize("seed", range(10))
def test_ignoring_negative_curvature_follows_scipy(seed):
    random = np.random.default_rng(seed)
    Q = np.linalg.qr(random.normal(size=(6, 6)))[0]
    A, b = Q * [-3, -1, 1, 2, 4, 5] @ Q.T, random.normal(size=6)
    for k in range(1, 5):
        expected, _ = scipy.sparse.linalg.cg(A, b, rtol=0, atol=0, maxiter=k)
        result = cg(
            lambda v: torch.from_numpy(A) @ v,
            torch.from_numpy(b),
            maxiter=k,
            tol=0,
            atol=0,
            negative_curvature="ignore",
        )
        np.testing.assert_allclose(result.x, expected, rtol=1e-7)


def test_ignoring_zero_curvature_ends_in_a_breakdown():
    b = vector(3)
    result = cg(torch.zeros_like, b, negative_curvature="ignore")
    assert result.solve.reason == "breakdown"
    assert torch.equal(result.x, b)


@pytest.mark.versions
def test_step_that_overflows_ends_in_a_breakdown():
    A, b = torch.tensor([[0, 1e18], [1e18, 0]]), torch.tensor([1, 1e-30])
    result = cg(lambda v: A @ v, b, negative_curvature="ignore")
    assert result.solve.reason == "breakdown"
    assert torch.equal(result.x, b)


# Errors.


def faulty(fault: float, call: int):
    """A product that returns `fault` somewhere on its given call, counted from 0."""
    A, calls = definite(6), iter(range(100))

    def product(v: Tensor) -> Tensor:
        Av = A @ v
        if next(calls) == call:
            Av[2] = fault
        return Av

    return product


@pytest.mark.versions
@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("iteration", [1, 3])
def test_numbers_from_A_that_are_not_finite_raise_an_error_that_says_when(fault, iteration):
    message = rf"At iteration {iteration}, A\(p\) has numbers that are not finite"
    with pytest.raises(RuntimeError, match=message):
        cg(faulty(fault, iteration - 1), vector(6))
    with pytest.raises(RuntimeError, match=message):
        cg(faulty(fault, iteration), vector(6), vector(6))


@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
def test_numbers_from_the_input_that_are_not_finite_raise_an_error_that_says_which(fault):
    good, bad = vector(6), vector(6).index_fill(0, torch.tensor(2), fault)
    with pytest.raises(ValueError, match="b has numbers that are not finite"):
        cg(torch.clone, bad)
    with pytest.raises(ValueError, match="x0 has numbers that are not finite"):
        cg(torch.clone, good, bad)
    with pytest.raises(RuntimeError, match=r"A\(x0\) has numbers that are not finite"):
        cg(faulty(fault, 0), good, good)


def test_numbers_too_large_to_square_are_told_from_infinite_ones():
    with pytest.raises(
        RuntimeError, match=r"iteration 1, A\(p\) is too large, up to .*e\+30: its n"
    ):
        cg(lambda v: 1e30 * v, torch.ones(3))
    with pytest.raises(ValueError, match=r"^b is too large, up to .*e\+30: .* Scale it down"):
        cg(torch.clone, torch.full((3,), 1e30))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tol": -1e-3}, "tol .* -0.001"),
        ({"tol": math.nan}, "tol .* nan"),
        ({"atol": -1.0}, "atol .* -1.0"),
        ({"atol": math.inf}, "atol .* inf"),
        ({"maxiter": -1}, "maxiter .* -1"),
        ({"maxiter": 1.5}, "maxiter .* 1.5"),
        ({"negative_curvature": "go"}, "negative_curvature .* 'go'"),
        ({"x0": torch.zeros(4)}, r"x0 must have shape .*\[3\].*\[4\]"),
        ({"x0": torch.zeros(1)}, r"x0 must have shape .*\[3\].*\[1\]"),
        ({"x0": torch.zeros(3, device="meta")}, "x0 must have device cpu, .* meta"),
        ({"A": lambda v: v[:1]}, r"A\(p\) must have shape .*\[3\].*\[1\]"),
        ({"A": lambda v: v.to("meta")}, r"A\(p\) must have device cpu, .* meta"),
        ({"M": lambda v: v.expand(3, 3)}, r"M\(r\) must have shape .*\[3\].*\[3, 3\]"),
    ],
)
def test_values_out_of_range_raise_an_error_that_names_them(options, message):
    with pytest.raises(ValueError, match=message):
        cg(**{"A": torch.clone, "b": torch.ones(3)} | options)


@pytest.mark.versions
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"b": torch.ones(3, dtype=torch.int64)}, "b must be real floating point, .*int64"),
        ({"b": torch.ones(3, dtype=torch.complex64)}, "b must be real floating point, .*complex"),
        ({"b": [1.0]}, "b must be a tensor, not list"),
        ({"x0": [1.0]}, "x0 must be a tensor, not list"),
        ({"x0": torch.ones(3).double()}, "x0 must have dtype torch.float32, .*float64"),
        ({"A": lambda v: None}, r"A\(p\) must be a tensor, not NoneType"),
        ({"A": lambda v: v.double()}, r"A\(p\) must have dtype torch.float32, .*float64"),
        ({"M": lambda v: v.half()}, r"M\(r\) must have dtype torch.float32, .*float16"),
    ],
)
def test_types_that_disagree_raise_an_error_that_names_them(options, message):
    with pytest.raises(TypeError, match=message):
        cg(**{"A": torch.clone, "b": torch.ones(3)} | options)


# Waits for the device.


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("start", [None, "random"])
@pytest.mark.parametrize("kind", KINDS)
def test_waits_once_per_iteration_and_once_per_solve(kind, start, device):
    eigenvalues = {
        "definite": [1, 2, 3, 4, 5],
        "semi-definite": [1, 2, 3, 0, 0],
        "rank one": [1, 0, 0, 0, 0],
        "indefinite": [5, 4, 3, 2, -1],
        "negative definite": [-1, -2, -3, -4, -5],
        "zero": [0, 0, 0, 0, 0],
    }[kind]
    A = torch.tensor(eigenvalues, dtype=torch.float32, device=device)
    b = torch.ones(5, device=device)
    x0 = None if start is None else torch.arange(5.0, device=device)
    with counted_conversions() as conversions:
        result = cg(A.mul, b, x0, M=lambda v: v / 2)
    iterations = result.solve.products - (x0 is not None)
    assert 0 < len(conversions) <= iterations + 1
