"""The optimizer and its textbook version, the reference of the benchmark, take the same steps."""

import pytest
import torch
from backpack import extend
from backpack.extensions import GGNMP
from benchmarks.textbook import TextbookOptimizer, textbook_cg

from cgn_tutorial import CGNOptimizer
from cgn_tutorial.pages import load_published_run, make_model, mnist_loader, train


def test_the_textbook_version_solves_the_system():
    torch.manual_seed(0)
    root = torch.randn(10, 10, dtype=torch.float64)
    A = root @ root.T + torch.eye(10)
    b = torch.randn(10, dtype=torch.float64)
    x = textbook_cg(lambda v: A @ v, b, maxiter=20, tol=1e-10, atol=0.0)
    torch.testing.assert_close(x, torch.linalg.solve(A, b))


@pytest.mark.parametrize("maxiter", [0, 1, 3])
def test_the_textbook_version_takes_one_iteration_more_and_a_product_for_the_first_residual(
    maxiter,
):
    vectors = []

    def A(v):
        vectors.append(v)
        return torch.arange(1.0, 11.0) * v

    textbook_cg(A, torch.ones(10), maxiter=maxiter, tol=0.0, atol=0.0)
    assert len(vectors) == maxiter + 2
    assert not vectors[0].any()


def test_the_optimizer_prints_the_digits_of_the_textbook_version():
    config = load_published_run()["config"]
    seed, batch_size = config.pop("seed"), config.pop("batch_size")
    printed = []
    for optimizer_type in (TextbookOptimizer, CGNOptimizer):
        torch.manual_seed(seed)
        model = extend(make_model())
        optimizer = optimizer_type(model.parameters(), GGNMP(), **config)
        loss_function = extend(torch.nn.CrossEntropyLoss())
        loader = mnist_loader(batch_size)
        history = train(model, loss_function, optimizer, loader, steps=6)
        printed.append([f"{loss:.5f}" for loss in history.loss])
    assert printed[0] == printed[1]
    assert len(set(printed[0])) == 6
