"""What the guides promise: examples run, loops win, symptoms occur and are cured."""

from __future__ import annotations

import doctest
import itertools
import math
import re
import runpy
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from loops import RATES, load, load_once, runs
from torch.nn.functional import cross_entropy

from cgn_tutorial import GGN, CGNOptimizer, Hessian, layers
from cgn_tutorial.pages import make_model

GUIDES = Path(__file__).parents[1] / "docs" / "guides"
SEEDS = range(3)


@pytest.mark.parametrize("page", sorted(GUIDES.glob("*.rst")), ids=lambda page: page.stem)
def test_the_examples_of_a_guide_run(page, monkeypatch):
    monkeypatch.syspath_prepend(GUIDES)
    result = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert result.failed == 0
    for name in ("accumulation", "callback", "scaling"):
        sys.modules.pop(name, None)


# The loops.


@pytest.mark.parametrize("name", ["images", "table", "text"])
def test_newton_steps_end_lower_than_as_many_of_sgd_at_its_best_rate(name):
    """From one seed; of three seeds the table tells, which `test_tables` reads."""
    plain, newton = load(name), load(f"{name}_cgn")
    losses = {rate: plain(rate, seed=0) for rate in RATES["SGD"]}
    best = min(filter(math.isfinite, losses.values()))
    assert newton(seed=0) < 0.95 * best
    assert losses[RATES["SGD"][0]] > best  # smaller ones would be no better


@pytest.mark.parametrize("name", ["images", "table_cgn", "table_backpack"])
def test_the_time_of_a_loop_is_that_of_its_steps(name, monkeypatch):
    monkeypatch.setattr("time.perf_counter", itertools.count().__next__)
    losses, took = runs(load(name), 5, range(2), lr=0.1)
    assert losses == [load(name)(steps=5, seed=seed, lr=0.1) for seed in range(2)]
    assert took == 5


def test_products_of_backpack_end_as_low_as_those_of_autograd():
    backpack, autograd = load("table_backpack"), load("table_cgn")
    assert backpack(seed=0) < 1.5 * autograd(seed=0)


@pytest.mark.parametrize("name", ["images_cgn", "table_cgn", "table_backpack", "text_cgn"])
def test_a_loop_changes_few_lines(name):
    plain, changed = (
        (GUIDES / "loops" / f"{file}.py").read_text().splitlines()
        for file in (name.partition("_")[0], name)
    )
    gone = Counter(plain) - Counter(changed)
    assert sum(gone.values()) <= 6
    assert any("torch.optim.SGD" in line for line in gone)
    assert any("loss.backward()" in line for line in gone)


@pytest.mark.parametrize("name", ["lightning", "accelerate"])
def test_a_loop_of_a_client_changes_few_lines(name):
    plain, changed = (
        Counter((GUIDES / "loops" / f"table_{name}{newton}.py").read_text().splitlines())
        for newton in ("", "_cgn")
    )
    gone = plain - changed
    assert sum(gone.values()) <= 6
    assert any("torch.optim.SGD" in line for line in gone)
    assert "curvature.backward(loss, " in "".join(changed - plain)


def test_the_recipe_trains_by_newton_steps_and_muon_and_averages():
    for seed in SEEDS:
        plain, averaged = load("images_recipe")(seed=seed)
        assert averaged < plain < 0.5
        assert averaged < 0.3


# The symptoms.

fit = runpy.run_path(str(GUIDES / "symptoms.py"))["fit"]


def fits(**options):
    """The losses and the reasons of all solves, for each seed."""
    runs = [fit(seed, **options) for seed in SEEDS]
    return [
        (losses, Counter(solve.reason for of_step in solves for solve in of_step.values()))
        for losses, solves in runs
    ]


def test_the_loss_explodes():
    wild = {"lr": 1.0, "damping": 1e-5, "tol": 0.01, "maxiter": 50, "steps": 10}
    for losses, _ in fits(**wild):
        assert losses[1] > 5 * losses[0]
    for cure in ({"max_length": 0.2}, {"lr": 0.1}):
        for losses, _ in fits(**wild | cure):
            assert max(losses) < 1.5 * losses[0]
            assert losses[-1] < 0.7 * losses[0]
    for losses, _ in fits(**wild | {"damping": 0.1}):
        assert max(losses) > 5 * losses[0]


def test_nothing_moves():
    lr, damping = 0.3, 100.0
    assert lr / damping == pytest.approx(0.003)
    for losses, _ in fits(damping=damping):
        assert losses[-1] > 0.9 * losses[0]
    for losses, _ in fits(damping=0.01):
        assert losses[-1] < 0.5 * losses[0]


def test_all_solves_hit_the_budget():
    short, loose, long = (
        fits(**options)
        for options in (
            {"tol": 0.01, "maxiter": 3},
            {"tol": 0.3, "maxiter": 3},
            {"tol": 0.01, "maxiter": 100},
        )
    )
    for (losses, reasons), (loose_losses, loose_reasons), (long_losses, _) in zip(
        short, loose, long, strict=True
    ):
        assert reasons["maxiter"] > 0.95 * reasons.total()
        assert long_losses[-1] < losses[-1] / 4
        assert loose_reasons["converged"] > 0.9 * loose_reasons.total()
        assert loose_losses[-1] == pytest.approx(losses[-1], rel=0.15)


def test_most_solves_stop_at_negative_curvature():
    images, labels = load_once().tensors
    for seed in SEEDS:
        found = {}
        for kind in (Hessian, GGN):
            torch.manual_seed(seed)
            model = make_model()
            curvature = kind(layers(model))
            options = {"lr": 0.1, "damping": 1e-3, "tol": 0.1, "maxiter": 20}
            optimizer = CGNOptimizer(model.parameters(), curvature, **options)
            reasons = Counter()
            for _ in range(10):
                batch = torch.randint(60_000, (64,))
                optimizer.zero_grad()
                outputs = model(images[batch])
                loss = cross_entropy(outputs, labels[batch])
                curvature.backward(loss, outputs)
                optimizer.step()
                reasons.update(solve.reason for solve in optimizer.solves.values())
            found[kind] = reasons, loss.item()
        reasons, loss = found[Hessian]
        assert reasons["negative curvature"] > 0.5 * reasons.total()
        assert loss > 2
        reasons, loss = found[GGN]
        assert not reasons["negative curvature"]
        assert loss < 1.6


def test_fine_and_then_stuck():
    noisy = {"lr": 0.5, "steps": 100}
    stuck, falling, large = (
        fits(**noisy | cure) for cure in ({"batch": 32}, {"batch": 32, "fall": True}, {})
    )
    for losses, _ in stuck:
        assert losses[20] < 0.6 * losses[0]  # fine
        assert min(losses[50:]) > 0.7 * min(losses[:50])  # stuck
    for (losses, _), (after_falling, _), (on_large, _) in zip(stuck, falling, large, strict=True):
        assert after_falling[-1] < losses[-1]
        assert on_large[-1] < 0.7 * losses[-1]


def test_stuck_with_solves_that_converge():
    for (losses, reasons), (tight, _) in zip(fits(), fits(tol=0.01, maxiter=100), strict=True):
        assert reasons["converged"] == reasons.total()
        assert losses[-1] > 0.8 * losses[15]
        assert tight[-1] < 0.3 * losses[-1]


def test_each_symptom_of_the_page_has_its_test():
    page = (GUIDES / "choosing.rst").read_text(encoding="utf-8")
    tests = re.findall(r"^     - `(test_\w+)`$", page, re.MULTILINE)
    assert len(tests) == 6
    assert set(tests) <= globals().keys()
