"""The training loop repeats the published run, and tells what happened."""

import pytest
import torch
from backpack import extend
from backpack.extensions import GGNMP, PCHMP

from cgn_tutorial import CGNOptimizer
from cgn_tutorial.pages import accuracy, load_published_run, make_model, mnist_loader, train

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


@pytest.mark.parametrize(
    ("label", "make_optimizer", "tolerance"),
    [
        ("GGN", newton(GGNMP()), 2e-3),
        ("PCH-clip", newton(PCHMP(modify="clip")), 2e-3),
        ("SGD, lr=0.1", lambda p: torch.optim.SGD(p, 0.1), 1e-4),
        ("SGD, lr=10", lambda p: torch.optim.SGD(p, 10), 1e-4),
    ],
)
def test_the_published_log_repeats(label, make_optimizer, tolerance):
    iterations, published = PUBLISHED["iterations"], PUBLISHED["runs"][label]
    history = run(make_optimizer, iterations[-1] + 1)
    assert [history.loss[i] for i in iterations] == pytest.approx(published["loss"], abs=tolerance)
    assert [history.accuracy[i] for i in iterations] == pytest.approx(
        published["accuracy"], abs=1.001 / 64
    )


def test_the_history_has_an_entry_for_every_step():
    history = run(newton(GGNMP()), 2)
    assert len(history.loss) == len(history.accuracy) == len(history.seconds) == 2
    assert all(seconds > 0 for seconds in history.seconds)
    for solves, products in zip(history.solves, history.products, strict=True):
        assert len(solves) == 8
        assert 0 < products == sum(solve.products for solve in solves)


def test_other_optimizers_count_no_products():
    assert run(lambda p: torch.optim.Adam(p), 2).products == [0, 0]


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
