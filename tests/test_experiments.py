"""The experiments choose by their rule, go on after an interruption, and stop as they say."""

import json
import math
import statistics

import experiments
import pytest
from experiments import (
    GOALS,
    SPACES,
    WORKLOADS,
    Job,
    best,
    best_of_k,
    first,
    promising,
    settings_of,
    work,
)

from cgn_tutorial.pages.races import METHODS, Measurement, Run, Setting


def reached_at(*times):
    """Tests that reach the goals at these times."""
    return [[1.0, t, goal] for t, goal in zip(times, GOALS, strict=True) if t < math.inf]


def test_finished_jobs_are_not_repeated(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"job": "a", "found": 1.0}\n')
    found = {"a": 1.0}
    jobs = [Job("a", 1.0, math.sqrt, (-1.0,)), Job("b", 1.0, math.sqrt, (4.0,))]  # a would fail
    work(jobs, found, path, processes=1)
    assert found == {"a": 1.0, "b": 2.0}
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"job": "a", "found": 1.0},
        {"job": "b", "found": 2.0},
    ]


def test_the_first_test_at_a_goal_counts():
    tests = [[10, 1.0, 0.5], [20, 2.0, 0.91], [30, 3.0, 0.92]]
    assert first(tests, 0.9) == tests[1]
    assert first(tests, 0.95)[1] == math.inf


@pytest.mark.parametrize("network", WORKLOADS)
def test_every_contender_draws_as_many_settings_and_the_same_each_time(network):
    assert SPACES.keys() == METHODS.keys()
    for contender in SPACES:
        settings = settings_of(network, contender)
        assert len(settings) == WORKLOADS[network].settings
        assert settings == settings_of(network, contender)
        assert len({str(setting) for setting in settings}) == len(settings)
        assert {setting.method for setting in settings} == {contender}
        for setting in settings[:2]:
            Run(setting, 0)  # every option is known


def test_every_value_of_a_space_is_drawn_in_time(monkeypatch):
    workload = WORKLOADS["sigmoid CNN"]._replace(settings=400)
    monkeypatch.setattr(experiments, "WORKLOADS", {"sigmoid CNN": workload})
    adam = settings_of("sigmoid CNN", "Adam")
    assert {s.options["betas"] for s in adam} == {
        (a, b) for a in (0.5, 0.8, 0.9) for b in (0.9, 0.95, 0.999)
    }
    assert {s.batch_size for s in adam} == {64, 128, 256, 1024}
    assert {s.schedule for s in adam} == {"constant", "linear", "cosine"}
    rates = [s.options["lr"] for s in adam]
    assert 2e-3 <= min(rates) < 2.2e-3
    assert 3.6e-2 < max(rates) <= 4e-2
    assert statistics.median(rates) == pytest.approx((2e-3 * 4e-2) ** 0.5, rel=0.2)


def test_the_worse_half_is_given_up_at_each_rung(monkeypatch):
    settings = [Setting("SGD", {"lr": lr}) for lr in (0.1, 0.2, 0.3, 0.4)]
    monkeypatch.setattr(experiments, "settings_of", lambda *_: settings)
    tried = []

    def go_on(runs, *, goals, seconds):
        tried.append(([run.setting.options["lr"] for run in runs], seconds))
        for run in runs:
            run.tests.append(Measurement(len(tried), seconds, 0.9 + run.setting.options["lr"] / 10))

    monkeypatch.setattr(experiments, "go_on", go_on)
    workload = WORKLOADS["sigmoid CNN"]._replace(rungs=(1, 2, 4))
    monkeypatch.setattr(experiments, "WORKLOADS", {"w": workload})
    result = experiments.search("w", "SGD", quick=False)
    assert tried[:3] == [([0.1, 0.2, 0.3, 0.4], 1), ([0.4, 0.3], 2), ([0.4], 4)]
    assert [len(tests) for tests in result["first"]] == [1, 1, 2, 3]
    assert {int(k) for k in result["second"]} == set(promising(result["first"]))
    assert tried[3] == ([settings[int(k)].options["lr"] for k in result["second"]], 4)


def test_the_three_fastest_to_some_goal_are_tried_again():
    found = [reached_at(t, t, math.inf) for t in (4, 3, 2, 1)] + [reached_at(9, 9, 9), []]
    assert promising(found) == [1, 2, 3, 4]


def test_the_setting_that_arrives_most_often_and_then_fastest_is_chosen():
    first_seed = [reached_at(1, 2, 3), reached_at(2, 3, 4), reached_at(3, math.inf, math.inf), []]
    second = {
        "0": reached_at(9, math.inf, math.inf),
        "1": reached_at(2, 3, math.inf),
        "2": reached_at(1, 1, math.inf),
    }
    result = {"first": first_seed, "second": second, "seconds": []}
    assert best({"search w, SGD": result}, "w", "SGD") == {0.9: 1, 0.95: 1, 0.97: 0}
    nothing = {"first": [[], []], "second": {}, "seconds": []}
    assert best({"search w, SGD": nothing}, "w", "SGD") == {}


def test_more_settings_take_more_time_and_find_no_worse():
    spent, fastest = best_of_k([3.0, 1.0, math.inf, 2.0], [5.0, 1.0, 5.0, 1.0])
    assert spent == [3, 6, 9, 12]
    assert fastest == sorted(fastest, reverse=True)
    assert fastest[-1] == 1
