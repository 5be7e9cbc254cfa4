"""Races are fair, end where they should, and tell what happened."""

import math
import warnings
from itertools import repeat

import pytest
import torch
from torch import nn

from cgn_tutorial.pages import races
from cgn_tutorial.pages.races import (
    METHODS,
    Measurement,
    Run,
    Setting,
    draw_batches,
    load_images,
    race,
    step_rates,
)

NEWTON = {"lr": 0.1, "damping": 1e-2, "tol": 0.1, "maxiter": 3}
OPTIONS = {method: NEWTON if method.startswith("CGN") else {"lr": 0.01} for method in METHODS}


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    """Test on few images, which takes less time."""
    images = {True: load_images(train=True)}
    images[False] = tuple(t[:500] for t in load_images(train=False))
    monkeypatch.setattr(races, "load_images", lambda *, train: images[train])


def weights(run):
    return [p.detach().clone() for p in run.model.parameters()]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_lowers_the_loss_of_a_batch(method, monkeypatch):
    batch = next(draw_batches(16, seed=0))
    monkeypatch.setattr(races, "draw_batches", lambda *_: repeat(batch))
    (run,) = race([Setting(method, OPTIONS[method])], seed=0, steps=30)
    assert run.losses[-1] < run.losses[0]
    assert not run.failed


def test_a_run_is_the_same_alone_and_in_a_race():
    settings = [Setting("CGN", NEWTON), Setting("Adam", {"lr": 0.01}), Setting("CGN", NEWTON)]
    first, adam, second = race(settings, 3, goal=1, steps=7)
    (alone,) = race(settings[:1], 3, goal=1, steps=7)
    assert first.losses == second.losses == alone.losses
    assert adam.losses[0] == first.losses[0]
    assert adam.losses[1:] != first.losses[1:]
    assert [(test.steps, test.accuracy) for test in first.tests] == [
        (test.steps, test.accuracy) for test in alone.tests
    ]


def test_another_seed_is_another_race():
    losses = [race([Setting("SGD", {"lr": 0.1})], seed, steps=3)[0].losses for seed in (0, 1)]
    assert losses[0] != losses[1]


def test_a_race_ends_after_its_steps():
    settings = [Setting("SGD", {"lr": 0.1}), Setting("Adam", {"lr": 0.1})]
    runs = race(settings, 0, goal=1, steps=5)
    assert [len(run.losses) for run in runs] == [5, 5]
    assert [run.tests[-1].steps for run in runs] == [5, 5]
    untested = race(settings, 0, steps=5)
    assert [run.losses for run in untested] == [run.losses for run in runs]
    assert [run.tests for run in untested] == [[], []]


def test_a_race_ends_at_its_goal():
    (run,) = race([Setting("Adam", {"lr": 0.01}, activation="ReLU")], 0, goal=0.5, seconds=60)
    assert run.tests[-1].accuracy >= 0.5 > max(test.accuracy for test in run.tests[:-1])
    assert run.reached(0.5) == run.tests[-1]
    assert run.reached(0.999) is None


def test_a_race_ends_after_its_seconds():
    (run,) = race([Setting("SGD", {"lr": 0.01})], 0, goal=1, seconds=0.05)
    assert run.seconds >= 0.05 > (run.tests[-2].seconds if len(run.tests) > 1 else 0)


def test_a_race_without_an_end_is_refused():
    with pytest.raises(ValueError, match="needs an end: a goal below 1, seconds, or steps"):
        race([Setting("SGD", {"lr": 0.01})], 0)


def test_a_race_goes_on_without_what_blew_up():
    settings = [Setting("SGD", {"lr": lr}, activation="ReLU") for lr in (1e30, 0.1)]
    bad, good = race(settings, 0, steps=6)
    assert bad.failed
    assert bad.fell_back()
    assert len(bad.losses) < len(good.losses) == 6
    assert not good.failed


@pytest.mark.parametrize(
    ("accuracies", "fell"),
    [([0.1, 0.9, 0.85], False), ([0.1, 0.9, 0.6, 0.95], True), ([0.5, 0.31], False), ([], False)],
)
def test_a_fifth_lost_on_the_way_is_a_fall(accuracies, fell):
    run = Run(Setting("SGD", {"lr": 0.1}), 0)
    run.tests = [Measurement(i, i, i, accuracy) for i, accuracy in enumerate(accuracies)]
    assert run.fell_back() == fell


def test_seconds_and_gradients_grow_with_the_steps():
    (run,) = race([Setting("CGN", NEWTON)], 0, goal=1, steps=6)
    assert run.seconds == run.tests[-1].seconds > run.tests[0].seconds > 0
    assert run.tests[-1].gradients > run.tests[-1].steps  # a Newton step costs more than one


def test_layers_without_curvature_take_gradient_steps():
    run = Run(Setting("CGN", NEWTON | {"without_curvature": (0, 1), "tol": 1e-6}), 0)
    before = weights(run)
    run.step()
    moves = [after - x for after, x in zip(weights(run), before, strict=True)]
    gradients = [p.grad for p in run.model.parameters()]
    for move, g in list(zip(moves, gradients, strict=True))[:4]:
        torch.testing.assert_close(move, -10 * g)
    for move, g in list(zip(moves, gradients, strict=True))[4:]:
        assert move.norm() < 5 * g.norm()


def test_budgets_may_differ_from_block_to_block():
    losses = [
        race([Setting("CGN", NEWTON | {"maxiter": maxiter})], 0, steps=5)[0].losses
        for maxiter in (3, (3, 3, 3, 3), (3, 3, 3, 1))
    ]
    assert losses[0] == losses[1] != losses[2]


def test_adam_moves_the_convolutions_and_newton_the_rest():
    runs = [
        Run(Setting("CGN + Adam", NEWTON | {"adam_lr": 0.01}), 0),
        Run(Setting("Adam", {"lr": 0.01}), 0),
        Run(Setting("CGN", NEWTON), 0),
    ]
    for run in runs:
        run.step()
    both, adam, newton = map(weights, runs)
    assert all(torch.equal(p, q) for p, q in zip(both[:4], adam[:4], strict=True))
    torch.testing.assert_close(both[4:], newton[4:])


def test_rates_read_off_sgd_are_its_own():
    rates = step_rates(Setting("SGD", {"lr": [0.1 * (i + 1) for i in range(8)]}), 0, steps=3)
    assert rates == pytest.approx([0.1 * (i + 1) for i in range(8)], rel=1e-3)


def test_the_average_of_the_weights_is_what_is_tested():
    options = {"batch_size": 16, "activation": "ReLU"}
    average = Run(Setting("SGD", {"lr": 0.3}, average=0.5, **options), 0)
    plain = Run(Setting("SGD", {"lr": 0.3}, **options), 0)
    expected = None
    for _ in range(12):
        average.step()
        plain.step()
        now = weights(plain)
        expected = [(a + b) / 2 for a, b in zip(expected or now, now, strict=True)]
    last = plain.test()
    with torch.no_grad():
        for p, q in zip(plain.model.parameters(), expected, strict=True):
            p.copy_(q)
    assert average.test() == plain.test() != last


def test_a_test_leaves_the_model_as_it_is():
    run = Run(Setting("CGN, BackPACK", NEWTON), 0)
    run.step()
    before = weights(run)
    run.test()
    assert all(torch.equal(p, x) for p, x in zip(weights(run), before, strict=True))
    run.step()
    assert math.isfinite(run.losses[-1])


def test_the_warning_of_backpacks_hooks_is_kept_back_and_others_are_not():
    setting = Setting("CGN, BackPACK", NEWTON)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        race([setting], 0, steps=1)
        assert [str(w.message) for w in caught if "hook" in str(w.message)] == []
        warnings.warn("Full backward hook is firing", stacklevel=1)
    assert "Full backward hook is firing" in [str(w.message) for w in caught]


def test_models_can_be_made_with_relu():
    kinds = {type(module) for module in Run(Setting("SGD", {"lr": 1}, activation="ReLU"), 0).model}
    assert nn.ReLU in kinds
    assert nn.Sigmoid not in kinds
