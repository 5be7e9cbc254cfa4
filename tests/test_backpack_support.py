"""What docs/guides/backpack.rst says of its tables, and that they would show a wrong product."""

import csv
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import trials
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call
from trials import AUTOGRAD, BACKPACK, LAYERS, LOSSES, MATRICES, REMEDIES, Case, Verdict, verdict

BENCH = Path(__file__).parents[1] / "docs" / "bench"
BY_NAME = {case.name: case for case in [*LAYERS, *LOSSES]}


def rows(name):
    with (BENCH / f"backpack_{name}.csv").open(encoding="utf-8") as file:
        return list(csv.reader(file))[1:]


#: The verdicts that the page shows, by case and column.
TABLE = {
    row[0]: dict(zip(MATRICES, row[1:], strict=True)) for row in rows("layers") + rows("losses")
}


def one_of_each_kind():
    """The first cell of each kind in the tables: right, zero, wrong, and each error."""
    first = {}
    for name, row in TABLE.items():
        for whose, word in row.items():
            first.setdefault("wrong" if "wrong" in word else word, (name, whose))
    return list(first.values())


def words(name, columns=MATRICES):
    """The first word of each cell of a row."""
    return [re.match(r"\w+", TABLE[name][whose].strip("*"))[0] for whose in columns]


def test_the_tables_have_a_row_for_each_case_in_order():
    assert list(TABLE) == [case.name for case in [*LAYERS, *LOSSES]]
    assert len(TABLE) == len(LAYERS) + len(LOSSES) > 60  # no name twice


@pytest.mark.parametrize(("name", "whose"), one_of_each_kind())
def test_a_cell_of_each_kind_comes_out_as_the_table_shows(name, whose):
    found = verdict(BY_NAME[name], whose).word
    if name == "`scaled_dot_product_attention`" and torch.__version__ < "2.8":
        assert found == "right"  # no fused kernel is taken there
    else:
        assert found == TABLE[name][whose]


def test_the_errors_of_the_tables_are_those_with_a_remedy():
    shown = {word for row in TABLE.values() for word in row.values() if "raises" in word}
    table = rows("errors")
    assert shown == {f"raises {number}" for number, _, _ in table}
    assert [remedy for _, _, remedy in table] == list(REMEDIES.values())
    assert [trials.known(said) for _, said, _ in table] == list(REMEDIES)


def test_an_error_without_a_remedy_makes_no_table():
    with pytest.raises(ValueError, match="No remedy is known for: what"):
        _ = Verdict(error="what").word


@pytest.mark.parametrize(
    "name",
    [
        *("Linear", "Conv2d", "ReLU", "MaxPool2d", "AvgPool2d", "Dropout, train"),
        *("MSELoss", 'MSELoss, `reduction="sum"`', '`reduction="sum"`', "`label_smoothing`"),
        "probabilities as targets",
    ],
)
def test_all_take(name):
    assert words(name) == ["right"] * 5


@pytest.mark.parametrize(
    "name",
    [
        'Conv2d, `padding="same"`, the first layer',
        'Conv2d, `padding_mode="circular"`',
        "a target of −100, the default index",
        "targets that add up to 3/2",
    ],
)
def test_backpack_is_wrong_without_a_word(name):
    assert words(name) == ["wrong"] * 3 + ["right"] * 2
    assert float(TABLE[name]["GGNMP"].split()[-1]) > 0.1


def test_padding_as_a_number_is_right():
    case = Case("", [lambda: nn.Conv2d(1, 2, 3, padding=1)], (2, 1, 5, 5))
    assert verdict(case, "GGNMP").right


def test_targets_without_the_ignored_ones_are_right():
    case = BY_NAME["a target of −100, the default index"]
    kept = replace(case, shape=case.inputs()[[0, 2]], targets=case.labels()[[0, 2]])
    assert verdict(kept, "GGNMP").right


@pytest.mark.parametrize("name", ["Sigmoid", "Tanh"])
def test_the_pch_alone_is_wrong_behind(name):
    assert words(name) == ["right", "right", "wrong", "right", "right"]


def test_batch_norm():
    for mode in ("train", "eval"):
        flat, images = f"BatchNorm1d on `[N, C]`, {mode}", f"BatchNorm2d, {mode}"
        assert words(flat) == ["right", "right", "raises", "right", "right"]
        assert words(images) == ["raises"] * 3 + ["right"] * 2


@pytest.mark.parametrize(
    "name",
    [
        *("A residual connection", "A residual connection, `use_converter=True`", "GELU"),
        *("Conv1d", "Embedding", "LSTM", "LayerNorm", "BCEWithLogitsLoss", "`ignore_index`"),
    ],
)
def test_autograd_takes_what_backpack_does_not(name):
    assert words(name) == ["raises"] * 3 + ["right"] * 2


def test_autograd_takes_nearly_all():
    refused = [name for name in TABLE if "raises" in words(name, AUTOGRAD)]
    known = ["EmbeddingBag", "`scaled_dot_product_attention`", "`weight_norm`", "MultiMarginLoss"]
    assert sorted(refused) == sorted(known)
    assert not [name for name in TABLE if "wrong" in words(name, AUTOGRAD)]
    assert words("`weight_norm`") == ["raises"] * 3 + ["right", "raises"]
    assert sum("raises" in words(name, BACKPACK) for name in TABLE) > 30


def test_the_remedies_for_what_autograd_refuses():
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for whose in AUTOGRAD:
            assert verdict(BY_NAME["`scaled_dot_product_attention`"], whose).right

    class Mean(nn.Module):
        def forward(self, x):
            return x.mean(1)

    indices = BY_NAME["EmbeddingBag"].inputs()
    assert verdict(Case("", [lambda: nn.Embedding(5, 4), Mean], indices), "GGN").right


def test_a_loss_that_is_linear_in_the_outputs_has_no_ggn():
    assert verdict(BY_NAME["NLLLoss of log-probabilities"], "GGN").zero
    assert TABLE["NLLLoss of log-probabilities"]["GGN"] == "right, but zero"


def test_a_wrong_product_is_shown_as_wrong(monkeypatch):
    right = trials.products(BY_NAME["Linear"], "GGN")
    monkeypatch.setattr(trials, "products", lambda case, whose: [right[0] * 1.01, *right[1:]])
    found = verdict(BY_NAME["Linear"], "GGN")
    assert not found.right
    assert found.word == "**wrong**, by 0.01"


def test_central_differences_are_the_hessian_by_autograd():
    case = BY_NAME["Sigmoid"]
    model, x, y = case.model(), case.inputs(), case.labels()
    blocks = trials.reference(case, "Hessian")
    for block, (name, p) in zip(blocks, model.named_parameters(), strict=True):

        def loss(q, name=name):
            return case.loss()(functional_call(model, {name: q}, (x,)), y)

        dense = hessian(loss, p.detach()).view_as(block)
        torch.testing.assert_close(block, dense, rtol=1e-8, atol=1e-9)
