"""The experiments choose by their rule, go on after an interruption, and stop as they say."""

import json
import math

import experiments
import pytest
import torch
from experiments import Job, best, first, work

from cgn_tutorial import cg
from cgn_tutorial.pages.races import Setting


def test_finished_jobs_are_not_repeated(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"job": "a", "found": 1.0}\n')
    found = {"a": 1.0}
    jobs = [Job("a", 1.0, math.sqrt, (-1.0,)), Job("b", 1.0, math.sqrt, (4.0,))]  # a would fail
    work(jobs, found, path, later=0.0)
    assert found == {"a": 1.0, "b": 2.0}
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"job": "a", "found": 1.0},
        {"job": "b", "found": 2.0},
    ]


def test_the_first_test_at_a_goal_counts():
    tests = [[10, 1.0, 9.0, 0.5], [20, 2.0, 18.0, 0.91], [30, 3.0, 27.0, 0.92]]
    assert first(tests, 0.9) == tests[1]
    assert first(tests, 0.95)[1] == math.inf


def test_the_least_median_time_is_chosen_and_what_never_got_there_is_not(monkeypatch):
    settings = [Setting("SGD", {"lr": lr}) for lr in (0.1, 1.0, 10.0)]
    workload = experiments.Workload({"way": settings}, 1.0, (7, 8))
    monkeypatch.setattr(experiments, "WORKLOADS", {"w": workload})
    times = {7: (1.0, 2.0, 1.5), 8: (9.0, 3.0, math.inf)}
    found = {
        f"tune w way {seed}": [{"tests": [[1, t, 1, 0.9]] if t < math.inf else []} for t in of_seed]
        for seed, of_seed in times.items()
    }
    chosen = best(found, "w", quick=False)
    assert chosen == {"way": {0.9: settings[1]}}


@pytest.mark.parametrize("start", [0.0, 0.01])
def test_by_progress_the_solve_ends_where_the_model_hardly_falls(start):
    eigenvalues = torch.logspace(0, 3, 60).double()
    b = torch.ones(60).double()
    x0 = torch.full((60,), start).double()
    options = {"tol": 0.0, "atol": 0.0, "maxiter": 60}
    whole = [x0]
    cg(eigenvalues.mul, b, x0, callback=whole.append, **options)
    found = experiments.cg_by_progress(eigenvalues.mul, b, x0, **options)
    models = [(x * (eigenvalues * x / 2 - b)).sum() for x in whole]
    stop = next(i for i in range(11, 61) if (models[i] - models[i - 10]) / models[i] < 5e-4 * 10)
    assert 11 < stop < 60
    torch.testing.assert_close(found.x, whole[stop])
