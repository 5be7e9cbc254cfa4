"""What the guides promise: examples run, loops win, symptoms occur and are cured."""

from __future__ import annotations

import csv
import doctest
import importlib
import inspect
import math
import re
import runpy
import statistics
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from backpack import backpack, extend
from backpack.extensions import GGNMP
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss

from cgn_tutorial import GGN, CGNOptimizer, Hessian, layers, load_mnist, make_model

GUIDES = Path(__file__).parents[1] / "docs" / "guides"
SEEDS = range(3)
RATES = (0.03, 0.1, 0.3, 1.0, 3.0)


@pytest.mark.parametrize("page", sorted(GUIDES.glob("*.rst")), ids=lambda page: page.stem)
def test_the_examples_of_a_guide_run(page, monkeypatch):
    monkeypatch.syspath_prepend(GUIDES)
    result = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert result.failed == 0
    for name in ("accumulation", "callback"):
        sys.modules.pop(name, None)


# The loops.


def loop(name):
    return runpy.run_path(str(GUIDES / "loops" / f"{name}.py"))["train"]


@pytest.mark.parametrize("name", ["images", "table", "text"])
def test_newton_steps_end_lower_than_as_many_of_sgd_at_its_best_rate(name):
    plain, newton = loop(name), loop(f"{name}_cgn")
    by_rate = {rate: [plain(rate, seed=seed) for seed in SEEDS] for rate in RATES}
    best = min(statistics.median(losses) for losses in by_rate.values() if max(losses) < math.inf)
    assert statistics.median(newton(seed=seed) for seed in SEEDS) < 0.95 * best
    rates = [rate for rate, losses in by_rate.items() if statistics.median(losses) == best]
    assert rates != [RATES[0]]  # smaller ones would be no better


def test_products_of_backpack_end_as_low_as_those_of_autograd():
    backpack, autograd = loop("table_backpack"), loop("table_cgn")
    losses = [
        statistics.median(train(seed=seed) for seed in SEEDS) for train in (backpack, autograd)
    ]
    assert losses[0] < 1.5 * losses[1]


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


# The symptoms.

make_table = runpy.run_path(str(GUIDES / "loops" / "table.py"))["make_table"]


def fit(seed, *, steps=30, batch=256, fall=False, **options):
    """Fit the table: the loss on all of it after each step, and the reasons of all solves."""
    torch.manual_seed(seed)
    inputs, targets = make_table(2000)
    model = nn.Sequential(
        nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
    )
    curvature = GGN(layers(model))
    options = {"lr": 0.3, "damping": 1e-2, "tol": 0.3, "maxiter": 10} | options
    optimizer = CGNOptimizer(model.parameters(), curvature, **options)
    losses, reasons = [mse_loss(model(inputs), targets).item()], Counter()
    for i in range(steps):
        if fall:
            optimizer.param_groups[0]["lr"] = options["lr"] * (1 - i / steps)
        rows = torch.randint(2000, (batch,))
        optimizer.zero_grad()
        outputs = model(inputs[rows])
        curvature.backward(mse_loss(outputs, targets[rows]), outputs)
        optimizer.step()
        reasons.update(solve.reason for solve in optimizer.solves)
        with torch.no_grad():
            losses.append(mse_loss(model(inputs), targets).item())
    return losses, reasons


def fits(**options):
    """Losses and reasons for each seed."""
    return [fit(seed, **options) for seed in SEEDS]


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
    images, labels = load_mnist().tensors
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
                reasons.update(solve.reason for solve in optimizer.solves)
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


# The numbers of the table.


def test_the_table_of_loops_says_what_the_page_does():
    with (GUIDES.parent / "bench" / "loops.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in ("images", "table", "text"):
        loss = {
            row["trained with"]: float(row["loss"].split()[0])
            for row in rows
            if row["loop"].startswith(name)
        }
        newton, adam = loss["CGN"], loss["Adam, in the time of CGN"]
        assert adam < newton < loss["SGD"]
        assert (loss["SGD, in the time of CGN"] < newton) == (name == "text")


# What BackPACK can take.


@pytest.fixture
def tried(monkeypatch):
    monkeypatch.syspath_prepend(GUIDES.parent / "_ext")
    yield importlib.import_module("tried")
    sys.modules.pop("tried")


def test_the_table_tells_right_from_wrong(tried, monkeypatch):
    case = tried.LAYERS["`Linear`, `Tanh`"]
    words = tried.verdicts(case)
    assert words == dict.fromkeys(tried.COLUMNS, "right") | {"PCHMP": "takes", "said": ""}
    products = tried.products
    monkeypatch.setattr(tried, "products", lambda *of: [1.01 * block for block in products(*of)])
    words = tried.verdicts(case)
    assert words == dict.fromkeys(tried.COLUMNS, "**wrong**, 0.01") | {
        "PCHMP": "takes",
        "said": "",
    }


def test_what_is_said_of_backpack_is_so(tried):
    cases = tried.LAYERS | tried.LOSSES
    for name, expected, said in (
        ("`BatchNorm1d`, in train mode", "right", ""),
        ("`BatchNorm2d`, in train mode", "raises", "no rule for BatchNorm2d"),
        ("An addition, `x + layer(x)`", "raises", "no rule for Residual"),
        ("A module used twice", "raises", "`AssertionError`"),
        ("… with `weight`", "raises", "Only default weight"),
        ("… with `ignore_index`", "raises", "Only default ignore_index"),
        ("`AvgPool2d`", "raises", "expected scalar type Double but found Float"),
    ):
        words = tried.verdicts(cases[name])
        assert words["GGNMP"] == words["HMP"] == expected, name
        assert said in words["said"]
        assert words["GGN"] == words["Hessian"] == "right", name


def test_average_pooling_works_in_single_precision():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3))
    x, y, v = torch.randn(4, 1, 5, 5), torch.arange(4) % 3, torch.randn(1, 2, 1, 2, 2)
    outputs = model(x)
    (product, *_) = GGN(model.parameters()).backward(cross_entropy(outputs, y), outputs)
    expected = product(v.flatten(1)).view_as(v)
    model, loss_function = extend(model), extend(nn.CrossEntropyLoss())
    with backpack(GGNMP()):
        loss_function(model(x), y).backward()
    torch.testing.assert_close(model[0].weight.ggnmp(v), expected)


# What to use when, and what to print.


def fastest(table, goal):
    with (GUIDES.parent / "experiments" / f"{table}.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["Goal"] == goal]
    seconds = {row["Method"]: row["Seconds"].split()[0] for row in rows}
    ended = {method: float(s) for method, s in seconds.items() if not s.startswith("never")}
    return min(ended, key=ended.get, default=None), ended


def test_what_is_said_of_when_to_use_what_is_in_the_experiments():
    assert fastest("batch_64", "90%")[0] == "CGN"
    assert set(list(fastest("batch_64", "97%")[1])[:2]) == {"Momentum", "Adam"}
    least = {batch: fastest(f"batch_{batch}", "97%") for batch in (64, 256, 1024)}
    assert least[256][0] == "CGN + Adam"
    assert least[256][1]["CGN + Adam"] == min(min(of.values()) for _, of in least.values() if of)
    assert {fastest("relu_batch_64", goal)[0] for goal in ("90%", "95%", "97%")} == {"Adam"}
    _, at_64 = fastest("batch_64", "90%")
    assert "CGN, Hessian" not in at_64
    for name in ("abs", "clip"):
        assert 1.5 < at_64[f"CGN, PCH-{name}"] / at_64["CGN per parameter"] < 2.5


def test_the_page_to_print_has_the_optimizers_defaults():
    page = (GUIDES / "cheatsheet.rst").read_text(encoding="utf-8")
    rows = re.findall(r"^   \* - ``(\w+)``\n     -.*\n     - (.+)$", page, re.MULTILINE)
    parameters = inspect.signature(CGNOptimizer).parameters
    assert {name: str(parameters[name].default) for name, _ in rows} == dict(rows)
    assert len(rows) == 8


ROOT = GUIDES.parents[1]


def test_contributing_has_every_session():
    page = (ROOT / "docs" / "contributing.rst").read_text(encoding="utf-8")
    table = page.partition("* - Session")[2].partition("Add a page")[0]
    sessions = re.findall(r"^   \* - `([\w-]+)`$", table, re.MULTILINE)
    noxfile = (ROOT / "noxfile.py").read_text(encoding="utf-8")
    declared = re.findall(r"^@nox\.session(?:\((.*)\))?\ndef (\w+)", noxfile, re.MULTILINE)
    names = [(re.findall(r'name="([\w-]+)"', of) or [name])[0] for of, name in declared]
    assert sorted(sessions) == sorted(names)


def test_the_release_is_the_one_that_changelog_and_citation_name():
    release = runpy.run_path(str(ROOT / "src" / "version.py"))["RELEASE"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)", changelog, re.MULTILINE)[0] == release
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (\S+)", citation, re.MULTILINE) == [release]
