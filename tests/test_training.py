"""The training loop repeats the published run, and tells what happened."""

import math
import subprocess
import sys
import warnings

import pytest
import torch
from backpack import extend
from backpack.extensions import GGNMP, PCHMP

from cgn_tutorial import CGNOptimizer
from cgn_tutorial.pages import accuracy, load_published_run, make_model, mnist_loader, train
from cgn_tutorial.pages.training import HARMLESS

PUBLISHED = load_published_run()
SOLVER = dict(PUBLISHED["config"])
SEED, BATCH_SIZE = SOLVER.pop("seed"), SOLVER.pop("batch_size")


def newton(extension):
    return lambda p: CGNOptimizer(p, extension, **SOLVER)


def run(make_optimizer, steps, **options):
    torch.manual_seed(SEED)
    model = extend(make_model())
    return train(
        model,
        extend(torch.nn.CrossEntropyLoss()),
        make_optimizer(model.parameters()),
        mnist_loader(BATCH_SIZE),
        steps=steps,
        **options,
    )


@pytest.mark.versions
@pytest.mark.parametrize(
    ("label", "make_optimizer", "tolerance", "until"),
    [
        ("GGN", newton(GGNMP()), 2e-3, 50),
        ("PCH-clip", newton(PCHMP(modify="clip")), 2e-3, 10),
        ("SGD, lr=0.1", lambda p: torch.optim.SGD(p, 0.1), 1e-4, 20),
    ],
)
def test_the_published_log_repeats(label, make_optimizer, tolerance, until):
    """One run to its end, and the beginning of others: page 3 repeats all nine to their ends."""
    iterations = [i for i in PUBLISHED["iterations"] if i <= until]
    published = PUBLISHED["runs"][label]
    assert iterations[-1] == until
    history = run(make_optimizer, until + 1)
    for name, bound in (("loss", tolerance), ("accuracy", 1.001 / 64)):
        here = [getattr(history, name)[i] for i in iterations]
        assert here == pytest.approx(published[name][: len(here)], abs=bound)


@pytest.mark.versions
def test_the_history_has_an_entry_for_every_step():
    history = run(newton(GGNMP()), 2)
    assert len(history.loss) == len(history.accuracy) == len(history.seconds) == 2
    assert all(seconds > 0 for seconds in history.seconds)
    for solves, products in zip(history.solves, history.products, strict=True):
        assert len(solves) == 8
        assert 0 < products == sum(solve.products for solve in solves.values())


def test_other_optimizers_count_no_products():
    assert run(lambda p: torch.optim.Adam(p), 2).products == [0, 0]


@pytest.mark.versions
def test_the_log_has_the_published_form(capsys):
    run(lambda p: torch.optim.SGD(p, 0.1), 11, log_every=10)
    assert capsys.readouterr().out.splitlines() == [
        "Iteration   0/ 10  Minibatch Loss 2.30490  Accuracy 0.15625",
        "Iteration  10/ 10  Minibatch Loss 2.29734  Accuracy 0.07812",
    ]


def test_training_is_quiet_unless_asked(capfd):
    run(lambda p: torch.optim.SGD(p, 0.1), 2)
    assert capfd.readouterr() == ("", "")


def test_training_ends_with_the_batches():
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 2)
    batches = [(torch.randn(4, 2), torch.randint(2, (4,)))] * 3
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    history = train(model, torch.nn.CrossEntropyLoss(), optimizer, batches, steps=10)
    assert len(history.loss) == 3


def test_the_backward_pass_can_be_replaced():
    calls = []

    def backward(loss, outputs):
        calls.append(outputs.shape)
        loss.backward()

    run(lambda p: torch.optim.SGD(p, 0.1), 2, backward=backward)
    assert calls == [(64, 10), (64, 10)]


def test_accuracy_is_the_share_of_right_answers():
    outputs = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    assert accuracy(outputs, torch.tensor([1, 0, 0, 1])) == 0.75
    pixels = outputs.T.view(1, 2, 2, 2)  # an image, each pixel of a class
    assert accuracy(pixels, torch.tensor([[[1, 0], [0, 1]]])) == 0.75


def test_soft_labels_are_right_where_the_largest_is():
    outputs = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [2.0, 1.0]])
    soft = torch.tensor([[0.1, 0.9], [0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.3, 0.7]])
    assert accuracy(outputs, soft) == pytest.approx(0.6)


def test_ignored_targets_do_not_count():
    outputs = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    assert accuracy(outputs, torch.tensor([1, -100, 0])) == 0.5


REGRESSIONS = {
    "numbers": (torch.randn(5, 1), torch.randn(5, 1)),
    "several numbers": (torch.randn(5, 3), torch.randn(5, 3)),
    "numbers without a dimension": (torch.randn(5), torch.randn(5)),
    "positive numbers": (torch.rand(5, 2), torch.rand(5, 2) + 1),
    "one logit": (torch.randn(5, 1), torch.ones(5, 1)),
    "one logit, whole numbers": (torch.randn(5, 1), torch.ones(5, 1, dtype=torch.int64)),
    "numbers for scores": (torch.randn(5, 2), torch.ones(5)),
    "indices in a column": (torch.randn(5, 2), torch.ones(5, 1, dtype=torch.int64)),
}


@pytest.mark.parametrize("name", REGRESSIONS)
def test_without_classes_there_is_no_accuracy(name):
    assert math.isnan(accuracy(*REGRESSIONS[name]))


@pytest.mark.parametrize("targets", [torch.randn(4, 1), torch.tensor([0.6, 0.4]).expand(4, 2)])
def test_a_regression_and_soft_labels_train(targets):
    torch.manual_seed(0)
    classes = targets.shape[1]
    model = torch.nn.Linear(2, classes)
    loss_function = torch.nn.CrossEntropyLoss() if classes > 1 else torch.nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    history = train(model, loss_function, optimizer, [(torch.randn(4, 2), targets)] * 5, steps=5)
    assert history.loss[-1] < history.loss[0]
    assert len(history.accuracy) == 5
    assert all((0 <= a <= 1) == (classes > 1) for a in history.accuracy)


@pytest.mark.versions
def test_the_warning_of_backpacks_hooks_is_kept_back_while_training_alone():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(newton(GGNMP()), 1)
        assert [str(w.message) for w in caught if HARMLESS in str(w.message)] == []
        warnings.warn(HARMLESS, stacklevel=1)
    assert HARMLESS in [str(w.message) for w in caught]


IMPORT = """
import sys, warnings
import torch
filters, modules = list(warnings.filters), set(sys.modules)
import cgn_tutorial
assert warnings.filters == filters, warnings.filters
found = {name.partition(".")[0] for name in set(sys.modules) - modules} - sys.stdlib_module_names
assert found <= {"cgn_tutorial", "torch"}, found
import cgn_tutorial.pages.races
assert [f for f in warnings.filters if "hook" in str(f[1])] == []
"""


@pytest.mark.versions
def test_the_package_imports_nothing_but_torch_and_changes_no_filter_of_warnings():
    command = [sys.executable, "-I", "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{IMPORT}"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
