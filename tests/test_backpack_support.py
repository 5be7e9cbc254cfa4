"""What docs/guides/backpack.rst says of its tables, and that they would show a wrong product."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd.functional import hessian
from torch.func import functional_call

sys.path.insert(0, str(Path(__file__).parents[1] / "docs" / "_ext"))

import trials
from trials import LAYERS, LOSSES, MATRICES, Case, Verdict, verdict

BY_NAME = {case.name: case for case in [*LAYERS, *LOSSES]}
ALL = [*MATRICES]
BACKPACKS, AUTOGRADS = ALL[:3], ALL[3:]


def words(name, columns=ALL):
    """The first word of each cell of a row."""
    found = [verdict(BY_NAME[name], whose).word for whose in columns]
    return [re.match(r"\w+", word.strip("*"))[0] for word in found]


def test_names_are_distinct():
    assert len(BY_NAME) == len(LAYERS) + len(LOSSES)


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
    assert verdict(BY_NAME[name], "GGNMP").difference > 0.1


def test_padding_as_a_number_is_right():
    case = Case("", lambda: [nn.Conv2d(1, 2, 3, padding=1)], (2, 1, 5, 5))
    assert verdict(case, "GGNMP").right


def test_targets_without_the_ignored_ones_are_right():
    case = BY_NAME["a target of −100, the default index"]
    kept = replace(case, shape=case.inputs()[[0, 2]], targets=case.labels()[[0, 2]])
    assert verdict(kept, "GGNMP").right


@pytest.mark.parametrize("name", ["Sigmoid", "Tanh"])
def test_the_pch_alone_is_wrong_behind(name):
    assert words(name) == ["right", "right", "wrong", "right", "right"]


def test_batch_norm():
    works = ["right", "right", "raises", "right", "right"]
    assert (
        words("BatchNorm1d on `[N, C]`, train") == words("BatchNorm1d on `[N, C]`, eval") == works
    )
    refused = ["raises"] * 3 + ["right"] * 2
    assert words("BatchNorm2d, train") == words("BatchNorm2d, eval") == refused


@pytest.mark.parametrize(
    "name",
    [
        *("A residual connection", "A residual connection, `use_converter=True`", "GELU"),
        *("Conv1d", "Embedding", "LSTM", "LayerNorm", "BCEWithLogitsLoss", "`ignore_index`"),
    ],
)
def test_autograd_takes_what_backpack_does_not(name):
    assert words(name) == ["raises"] * 3 + ["right"] * 2


def test_autograd_refuses_the_hessian_of_weight_norm_and_fused_attention():
    assert words("`weight_norm`", AUTOGRADS) == ["right", "raises"]
    fused = words("`scaled_dot_product_attention`", AUTOGRADS)
    assert fused in (["raises"] * 2, ["right"] * 2)  # as torch has it


def test_the_remedies_for_what_autograd_refuses():
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert words("`scaled_dot_product_attention`", AUTOGRADS) == ["right"] * 2

    class Mean(nn.Module):
        def forward(self, x):
            return x.mean(1)

    indices = BY_NAME["EmbeddingBag"].inputs()
    assert verdict(Case("", lambda: [nn.Embedding(5, 4), Mean()], indices), "GGN").right


def test_a_loss_that_is_linear_in_the_outputs_has_no_ggn():
    found = verdict(BY_NAME["NLLLoss of log-probabilities"], "GGN")
    assert found.zero
    assert found.word == "right, but zero"


def test_every_error_has_a_remedy_and_an_unknown_one_stops_the_build():
    assert Verdict(error="Only implemented for affine=True, so it says").word.startswith(
        "raises\u00a0"
    )
    with pytest.raises(ValueError, match="No remedy is known for: what"):
        _ = Verdict(error="what").word


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
