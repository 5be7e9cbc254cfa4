"""Preconditioners against the dense matrix, and what they save."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cgn_tutorial import GGN, CGNOptimizer, Hessian, JacobianProduct, Nystrom, cg, cholesky
from cgn_tutorial.parallel import _checksums

DOUBLE = torch.float64


def block_of(C=None, root=None):
    """What a preconditioner needs of a block: names, products, perhaps a root."""

    class Fake:
        parameters = (torch.zeros(1),)
        product = SimpleNamespace() if root is None else JacobianProduct((), root)

        def __call__(self, v):
            return v @ C if root is None else self.product(v)

    return Fake()


def falling(n=60, seed=0):
    """A positive definite matrix with eigenvalues 10⁰, 10⁻¹, …, then 10⁻⁸."""
    Q = torch.linalg.qr(
        torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)
    )[0]
    eigenvalues = 10.0 ** -torch.arange(n, dtype=DOUBLE).clamp(max=8)
    return Q * eigenvalues @ Q.T


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)], ids=["tall", "wide"])
@pytest.mark.parametrize("stored", [True, False], ids=["root", "products"])
def test_cholesky_is_the_inverse(shape, stored):
    random = torch.Generator().manual_seed(0)
    J = torch.randn(shape, generator=random, dtype=DOUBLE)
    lam = torch.rand(shape[1], generator=random, dtype=DOUBLE) + 0.1
    block = block_of(root=J) if stored else block_of(J.T @ J)
    M = cholesky(block, lam)
    v = torch.randn(shape[1], generator=random, dtype=DOUBLE)
    torch.testing.assert_close(M(v), torch.linalg.solve(J.T @ J + torch.diag(lam), v))


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)], ids=["tall", "wide"])
def test_cg_corrects_cholesky_if_damping_is_below_rounding(shape):
    J = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    lam = torch.full(shape[1:], 1e-14, dtype=DOUBLE)
    M = cholesky(block_of(root=J), lam)
    b = J.T @ torch.ones(len(J), dtype=DOUBLE)
    solve = cg(lambda v: v @ J.T @ J + lam * v, b, M=M, tol=1e-8, atol=0.0).solve
    assert solve.converged
    assert solve.products <= 15


def test_nystrom_of_full_rank_is_the_inverse_but_for_a_factor():
    C, lam = falling(), torch.full((60,), 1e-3, dtype=DOUBLE)
    M = Nystrom(rank=60)(block_of(C), lam)
    v = torch.ones(60, dtype=DOUBLE)
    exact = torch.linalg.solve(C + torch.diag(lam), v) * (1e-8 + 1e-3)
    torch.testing.assert_close(M(v), exact, rtol=1e-6, atol=1e-9)


def test_nystrom_flattens_a_spectrum_that_falls_fast():
    C, lam = falling(), torch.full((60,), 1e-7, dtype=DOUBLE)
    A = C + torch.diag(lam)
    M = Nystrom(rank=12)(block_of(C), lam)
    MA = torch.stack([M(column) for column in A.T]).T
    assert torch.linalg.cond(A) > 1e6
    eigenvalues = torch.linalg.eigvals(MA).real
    assert eigenvalues.max() / eigenvalues.min() < 20
    b = torch.randn(60, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    plain = cg(lambda v: A @ v, b, tol=1e-6).solve
    preconditioned = cg(lambda v: A @ v, b, M=M, tol=1e-6).solve
    assert preconditioned.converged
    assert preconditioned.products < plain.products / 2


def test_nystrom_is_symmetric_and_positive_definite_without_damping():
    for C in (falling(), torch.zeros(60, 60, dtype=DOUBLE)):
        M = Nystrom(rank=12)(block_of(C), torch.zeros(60, dtype=DOUBLE))
        dense = torch.stack([M(column) for column in torch.eye(60, dtype=DOUBLE)])
        torch.testing.assert_close(dense, dense.T)
        assert torch.linalg.eigvalsh(dense).min() > 0


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("lam", [0.0, 1e-14, 1e-6])
@pytest.mark.parametrize("rows", [10, 200])
def test_nystrom_of_full_rank_stays_positive_definite(dtype, lam, rows):
    J = torch.randn(rows, 122, generator=torch.Generator().manual_seed(0)).to(dtype)
    lam = torch.full((122,), lam, dtype=dtype)
    M = Nystrom(rank=200)(block_of(root=J), lam)
    b = J.T @ torch.ones(rows, dtype=dtype)
    solve = cg(lambda v: v @ J.T @ J + lam * v, b, M=M, tol=1e-3, atol=0.0, maxiter=500).solve
    assert solve.residuals[-1] <= 1e-2 * solve.residuals[0]


def test_models_that_share_a_nystrom_have_approximations_of_their_own():
    preconditioner, lam = Nystrom(rank=12), torch.full((60,), 1e-7, dtype=DOUBLE)
    for seed in (0, 1):
        A = falling(seed=seed) + torch.diag(lam)
        M = preconditioner(block_of(falling(seed=seed)), lam)
        b = torch.ones(60, dtype=DOUBLE)
        assert cg(lambda v, A=A: A @ v, b, M=M, tol=1e-6).solve.products < 40


def test_nystrom_renews_its_approximation_every_so_many_steps():
    calls = []

    def counted(names):
        block = block_of(falling())
        multiply = type(block).__call__
        type(block).__call__ = lambda self, v: calls.append(names) or multiply(self, v)
        return block

    preconditioner = Nystrom(rank=3, every=2)
    a, b = counted(("a",)), counted(("b",))
    for _ in range(5):
        preconditioner(a, torch.ones(60, dtype=DOUBLE))
    preconditioner(b, torch.ones(60, dtype=DOUBLE))
    assert calls == [("a",)] * 3 + [("b",)]


def train(curvature_class=GGN, steps=4, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    inputs, targets = torch.randn(20, 4, dtype=DOUBLE), torch.randint(3, (20,))
    curvature = curvature_class([model.parameters()])
    optimizer = CGNOptimizer(
        model.parameters(), curvature, lr=0.3, damping=1e-2, tol=1e-10, atol=0.0, **options
    )
    products = 0
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = model(inputs)
        loss = nn.functional.cross_entropy(outputs, targets)
        curvature.backward(loss, outputs)
        optimizer.step()
        products += sum(solve.products for solve in optimizer.solves.values())
    return torch.cat([p.detach().flatten() for p in model.parameters()]), products


@pytest.mark.versions
@pytest.mark.parametrize(
    "preconditioner", [cholesky, Nystrom(20, every=1)], ids=["cholesky", "nystrom"]
)
def test_the_step_does_not_depend_on_the_preconditioner(preconditioner):
    plain, products = train()
    preconditioned, fewer = train(preconditioner=preconditioner)
    torch.testing.assert_close(preconditioned, plain, rtol=1e-6, atol=1e-8)
    assert fewer < products / 2


@pytest.mark.parametrize(
    "preconditioner", [cholesky, Nystrom(20, every=1)], ids=["cholesky", "nystrom"]
)
def test_a_matrix_that_is_not_positive_is_refused_with_a_remedy(preconditioner):
    with pytest.raises(RuntimeError, match=r"not positive.*take a GGN.*No parameter has been"):
        train(Hessian, preconditioner=preconditioner)


def test_copies_and_pickles_keep_the_preconditioner():
    model = nn.Linear(2, 3)
    optimizer = CGNOptimizer(
        model.parameters(), GGN([model.parameters()]), preconditioner=Nystrom(7)
    )
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert other.preconditioner.rank == 7


def test_processes_with_other_preconditioners_differ():
    model = nn.Linear(2, 3)
    curvature = GGN([model.parameters()])
    outputs = model(torch.ones(1, 2))
    curvature.backward(outputs.square().sum(), outputs)

    def options_of(preconditioner):
        optimizer = CGNOptimizer(model.parameters(), curvature, preconditioner=preconditioner)
        return _checksums(optimizer, optimizer.blocks(), 1)[1].item()

    assert options_of(Nystrom(7)) == options_of(Nystrom(7))
    assert options_of(lambda block, lam: None) == options_of(lambda block, lam: None)
    kinds = None, cholesky, Nystrom(7), Nystrom(8), Nystrom(7, every=3)
    assert len({options_of(kind) for kind in kinds}) == len(kinds)


def test_bad_options_are_refused():
    model = nn.Linear(2, 3)
    with pytest.raises(TypeError, match="preconditioner must be a function"):
        CGNOptimizer(model.parameters(), GGN([model.parameters()]), preconditioner="nystrom")
    for option in ("rank", "every"):
        for value in (0, 1.5):
            with pytest.raises(ValueError, match=f"{option} must be an integer"):
                Nystrom(**{option: value})
