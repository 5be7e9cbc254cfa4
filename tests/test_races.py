"""Races are fair, end where they should, and tell what happened."""

import math
from itertools import repeat

import pytest
import torch
from torch import nn

from cgn_tutorial.pages import races
from cgn_tutorial.pages.races import (
    HELD_OUT,
    METHODS,
    NETWORKS,
    SCHEDULES,
    Run,
    Setting,
    draw_batches,
    go_on,
    load_images,
    race,
)

NEWTON = {"lr": 0.1, "damping": 1e-2, "tol": 0.1, "maxiter": 3}
OPTIONS = {method: {"lr": 0.01} for method in METHODS} | {
    "Muon": {"lr": 0.01, "momentum": 0.9, "adam_lr": 0.01, "betas": (0.9, 0.999)},
    "CGN": NEWTON,
    "CGN + Adam": NEWTON,
    "CGN + Muon": NEWTON | {"muon_lr": 0.01, "momentum": 0.9, "adam_lr": 0.01},
}


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    """Test on few images, which takes less time."""
    images = {True: load_images(train=True)}
    images[False] = tuple(t[:500] for t in load_images(train=False))
    monkeypatch.setattr(races, "load_images", lambda *, train: images[train])


def weights(run):
    return [p.detach().clone() for p in run.model.parameters()]


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_lowers_the_loss_of_a_batch(method, network, monkeypatch):
    batch = next(draw_batches(16, seed=0))
    monkeypatch.setattr(races, "draw_batches", lambda *_, **__: repeat(batch))
    (run,) = race([Setting(method, OPTIONS[method], network=network)], seed=0, steps=30)
    assert run.losses[-1] < run.losses[0]
    assert not run.failed


def test_a_run_is_the_same_alone_and_in_a_race():
    settings = [Setting("CGN", NEWTON), Setting("Adam", {"lr": 0.01}), Setting("CGN", NEWTON)]
    first, adam, second = race(settings, 3, goals=[1], steps=7)
    (alone,) = race(settings[:1], 3, goals=[1], steps=7)
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
    runs = race(settings, 0, goals=[1], steps=5)
    assert [len(run.losses) for run in runs] == [5, 5]
    assert [run.tests[-1].steps for run in runs] == [5, 5]
    untested = race(settings, 0, steps=5)
    assert [run.losses for run in untested] == [run.losses for run in runs]
    assert [run.tests for run in untested] == [[], []]


def test_a_race_ends_at_its_goal():
    (run,) = race([Setting("Adam", {"lr": 0.01}, network="ReLU CNN")], 0, goals=[0.5], seconds=60)
    assert run.tests[-1].accuracy >= 0.5 > max(test.accuracy for test in run.tests[:-1])
    assert run.reached(0.5) == run.tests[-1]
    assert run.reached(0.999) is None


def test_a_race_ends_after_its_seconds():
    (run,) = race([Setting("SGD", {"lr": 0.01})], 0, goals=[1], seconds=0.05)
    assert run.seconds >= 0.05 > (run.tests[-2].seconds if len(run.tests) > 1 else 0)


def test_a_race_without_an_end_is_refused():
    with pytest.raises(ValueError, match="needs an end: a last goal below 1, seconds, or steps"):
        race([Setting("SGD", {"lr": 0.01})], 0)


def test_a_race_goes_on_without_what_blew_up():
    settings = [Setting("SGD", {"lr": lr}, network="ReLU CNN") for lr in (1e30, 0.1)]
    bad, good = race(settings, 0, steps=6)
    assert bad.failed
    assert len(bad.losses) < len(good.losses) == 6
    assert not good.failed


def test_a_run_goes_on_from_where_it_was():
    setting = Setting("Adam", {"lr": 0.01})
    (whole,) = race([setting], 0, goals=[1], steps=7)
    part = Run(setting, 0)
    for steps in (2, 7):
        go_on([part], goals=[1], steps=steps)
    assert part.losses == whole.losses


def test_seconds_grow_with_the_steps():
    (run,) = race([Setting("CGN", NEWTON)], 0, goals=[1], steps=6)
    assert run.seconds == run.tests[-1].seconds > run.tests[0].seconds > 0


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_rate_falls_to_zero_at_its_horizon_where_the_run_ends(schedule):
    plain, falling = (
        Run(Setting("SGD", {"lr": 0.5}, **options), 0)
        for options in ({}, {"schedule": schedule, "horizon": 4})
    )
    rates = []
    for run in (plain, falling):
        before = weights(run)
        for _ in range(4):
            run.step()
            gradients = [p.grad for p in run.model.parameters()]
            after = weights(run)
            if run is falling:
                rates.append(((before[-1] - after[-1]) / gradients[-1]).mean().item())
            before = after
    assert falling.losses[1] == plain.losses[1] != falling.losses[2] != plain.losses[2]
    assert rates == pytest.approx([0.5 * SCHEDULES[schedule](i / 4) for i in range(4)], rel=1e-3)
    assert SCHEDULES[schedule](1) == pytest.approx(0)
    assert falling.ended()
    assert not plain.ended()


def test_a_horizon_goes_with_a_rate_that_falls():
    for options in ({"horizon": 10}, {"schedule": "linear"}):
        with pytest.raises(ValueError, match="needs a horizon, and a constant rate has none"):
            Setting("SGD", {"lr": 0.1}, **options)


def test_the_layout_changes_the_time_alone():
    for method in set(METHODS) - {"L-BFGS"}:
        losses = [
            race([Setting(method, OPTIONS[method], channels_last=last)], 0, steps=4)[0].losses
            for last in (False, True)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_settings_are_chosen_by_images_on_which_no_run_trains():
    inputs, labels = races.load_images(train=True)
    seen, _ = next(draw_batches(len(inputs) - HELD_OUT, 0, held_out=HELD_OUT))
    assert seen.sum(dtype=torch.float64) == pytest.approx(
        inputs[:-HELD_OUT].sum(dtype=torch.float64).item(), rel=1e-6
    )
    run = Run(Setting("Adam", {"lr": 0.01}), 0, tuning=True)
    with torch.no_grad():
        answers = run.model(inputs[-HELD_OUT:]).argmax(1)
    assert run.test() == pytest.approx((answers == labels[-HELD_OUT:]).float().mean().item())


def test_a_quarter_of_the_test_images_is_enough_far_below_the_goal(monkeypatch):
    monkeypatch.setattr(races, "load_images", load_images)
    run = Run(Setting("Adam", {"lr": 0.01}), 0)
    with torch.no_grad():
        right = run.model(load_images(train=False)[0]).argmax(1) == load_images(train=False)[1]
    quarter, whole = (part.float().mean().item() for part in (right[:2500], right))
    assert run.test() == pytest.approx(whole)
    assert run.test(quarter + 0.01) == pytest.approx(whole)
    assert run.test(0.9) == pytest.approx(quarter)


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


@pytest.mark.parametrize("max_length", [math.inf, 0.05])
def test_a_gradient_step_may_keep_the_length_of_the_newton_step(max_length):
    options = NEWTON | {"maxiter": 20, "tol": 1e-3, "max_length": max_length}
    newton = Run(Setting("CGN", options), 0)
    control = Run(Setting("CGN", options | {"without_curvature": (2,), "keep_length": True}), 0)
    moves = []
    for run in (newton, control):
        before = weights(run)
        run.step()
        moves.append([after - x for after, x in zip(weights(run), before, strict=True)])
    for i, (a, b) in enumerate(zip(*moves, strict=True)):
        if i in (4, 5):  # the weight and the bias of the first linear layer
            g = list(control.model.parameters())[i].grad
            torch.testing.assert_close(b / b.norm(), -g / g.norm(), rtol=1e-3, atol=1e-4)
            assert torch.cosine_similarity(a.flatten(), b.flatten(), dim=0) < 0.95
        else:
            torch.testing.assert_close(a, b)
    lengths = [torch.cat([v.flatten() for v in move[4:6]]).norm().item() for move in moves]
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-3)
    if max_length < math.inf:  # the bound shortens this step
        free = Run(Setting("CGN", options | {"max_length": math.inf}), 0)
        before = weights(free)
        free.step()
        pairs = zip(weights(free)[4:6], before[4:6], strict=True)
        assert lengths[0] < 0.9 * torch.cat([(p - x).flatten() for p, x in pairs]).norm()


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


def test_the_average_of_the_weights_is_what_is_tested():
    options = {"batch_size": 16, "network": "ReLU CNN"}
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
    run = Run(Setting("CGN", NEWTON), 0)
    run.step()
    before = weights(run)
    run.test()
    assert all(torch.equal(p, x) for p, x in zip(weights(run), before, strict=True))
    run.step()
    assert math.isfinite(run.losses[-1])


def test_muon_turns_hidden_matrices_and_adam_the_rest():
    options = {"lr": 0.01, "momentum": 0.9, "adam_lr": 0.01, "betas": (0.9, 0.999)}
    runs = [Run(Setting("Muon", options), 0), Run(Setting("Adam", {"lr": 0.01}), 0)]
    before = weights(runs[0])
    for run in runs:
        run.step()
    muon, adam = map(weights, runs)
    for i, (x, p, q) in enumerate(zip(before, muon, adam, strict=True)):
        if i in (0, 2, 4):
            g = list(runs[0].model.parameters())[i].grad.flatten(1)
            step, slope = torch.linalg.svdvals((p - x).flatten(1)), torch.linalg.svdvals(g)
            assert step.sum() / step.max() > 2 * slope.sum() / slope.max()  # all count alike
        else:
            torch.testing.assert_close(p, q)


def test_beside_newton_steps_muon_and_adam_move_what_is_theirs():
    newton = Run(Setting("CGN + Muon", OPTIONS["CGN + Muon"] | {"last": 1}), 0)
    muon = Run(Setting("Muon", OPTIONS["Muon"]), 0)
    adam = Run(Setting("CGN + Adam", NEWTON | {"last": 1, "adam_lr": 0.01}), 0)
    for run in (newton, muon, adam):
        run.step()
    others = zip(weights(newton), weights(muon), weights(adam), strict=True)
    for i, (p, of_muon, of_adam) in enumerate(others):
        torch.testing.assert_close(p, of_muon if i in (0, 2, 4) else of_adam)


def test_the_networks_are_those_that_their_names_say():
    kinds = {name: {type(module) for module in make()} for name, make in NETWORKS.items()}
    assert nn.ReLU in kinds["ReLU CNN"]
    assert nn.Sigmoid not in kinds["ReLU CNN"]
    assert nn.Sigmoid in kinds["sigmoid CNN"]
    assert nn.Conv2d not in kinds["sigmoid MLP"]
    assert sum(isinstance(module, nn.Sigmoid) for module in NETWORKS["sigmoid MLP"]()) == 5
