"""What trains the networks of others takes the plain loop's steps, to the last bit."""

from __future__ import annotations

import runpy
from pathlib import Path

import lightning
import pytest
import torch
from accelerate import Accelerator
from ignite.engine import Engine, Events
from ignite.handlers.param_scheduler import LRScheduler
from skorch import NeuralNetClassifier
from skorch.callbacks import LRScheduler as LRCallback
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, TensorDataset

from cgn_tutorial import GGN, CGNOptimizer, LevenbergMarquardt, layers
from cgn_tutorial.pages import load_mnist, make_model

LOOPS = Path(__file__).parents[2] / "docs" / "guides" / "loops"

IMAGES, LABELS = (tensor[:256] for tensor in load_mnist().tensors)
BATCHES = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=64)
EPOCHS = 2
OPTIONS = {"maxiter": 3, "warm_start": 0.9}  # a warm start is a state to save


class Training:
    """The tutorial's network, its optimizer and a schedule."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = make_model()
        self.curvature = GGN(layers(self.model))
        self.optimizer = CGNOptimizer(self.model.parameters(), self.curvature, **OPTIONS)
        self.schedule = LinearLR(self.optimizer, 1.0, 0.1, total_iters=EPOCHS * len(BATCHES))


def plain(epochs: int = EPOCHS, half: bool = False) -> Tensor:
    """All weights after the plain loop, if need be with the model in half precision."""
    training = Training()
    for _ in range(epochs):
        for x, y in BATCHES:
            training.optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                outputs = training.model(x)
                loss = cross_entropy(outputs, y)
            training.curvature.backward(loss, outputs)
            training.optimizer.step()
            training.schedule.step()
    return weights(training.model)


def weights(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach()


@pytest.fixture(scope="module")
def expected() -> Tensor:
    found = plain()
    assert not torch.equal(found, weights(Training().model))
    return found


def test_the_plain_loop_repeats_itself(expected):
    assert torch.equal(plain(), expected)


# The loops of the guide.


@pytest.mark.parametrize(
    ("client", "alone", "options"),
    [
        ("table_lightning", "table", {"lr": 0.1}),
        ("table_lightning_cgn", "table_cgn", {}),
        ("table_lightning_manual", "table_cgn", {}),
        ("table_accelerate", "table", {"lr": 0.1}),
        ("table_accelerate_cgn", "table_cgn", {}),
    ],
)
def test_a_loop_of_the_guide_ends_with_the_loss_of_the_plain_one(client, alone, options):
    losses = [
        runpy.run_path(str(LOOPS / f"{name}.py"))["train"](steps=10, **options)
        for name in (client, alone)
    ]
    assert losses[0] == losses[1]


# Lightning.


class Automatic(lightning.LightningModule):
    """Lightning calls `backward` and the steps of optimizer and schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.training_of = Training()
        self.model = self.training_of.model

    def training_step(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        self.outputs = self.model(x)
        return cross_entropy(self.outputs, y)

    def backward(self, loss: Tensor) -> None:
        self.training_of.curvature.backward(loss, self.outputs)
        del self.outputs

    def configure_optimizers(self) -> dict[str, object]:
        schedule = {"scheduler": self.training_of.schedule, "interval": "step"}
        return {"optimizer": self.training_of.optimizer, "lr_scheduler": schedule}


class Manual(Automatic):
    """The module calls them itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor]) -> None:
        x, y = batch
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        optimizer.zero_grad()
        outputs = self.model(x)
        self.training_of.curvature.backward(cross_entropy(outputs, y), outputs)
        optimizer.step()
        schedule.step()


def trainer(epochs: int = EPOCHS, **options: object) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


@pytest.mark.parametrize("module", [Automatic, Manual])
def test_lightning_takes_the_steps_of_the_plain_loop(module, expected):
    module = module()
    trainer().fit(module, BATCHES)
    assert torch.equal(weights(module.model), expected)


@pytest.mark.parametrize("module", [Automatic, Manual])
def test_lightning_goes_on_from_a_checkpoint(module, expected, tmp_path):
    first = trainer(epochs=1)
    first.fit(module(), BATCHES)
    first.save_checkpoint(tmp_path / "first.ckpt")
    resumed = module()
    trainer().fit(resumed, BATCHES, ckpt_path=tmp_path / "first.ckpt")
    assert torch.equal(weights(resumed.model), expected)


def test_lightning_in_bfloat16_takes_the_steps_of_the_plain_loop_under_autocast():
    module = Automatic()
    trainer(epochs=1, precision="bf16-mixed").fit(module, BATCHES)
    assert torch.equal(weights(module.model), plain(epochs=1, half=True))
    assert not torch.equal(weights(module.model), plain(epochs=1))


# Accelerate.


def accelerated(accelerator: Accelerator, *, skip: int = 0, stop: int = EPOCHS, folder=None):
    """Train from the end of an epoch, if need be from its checkpoint, to that of another."""
    training = Training()
    model, optimizer, schedule, batches = accelerator.prepare(
        training.model, training.optimizer, training.schedule, BATCHES
    )
    if skip:
        accelerator.load_state(folder)
    for _ in range(skip, stop):
        for x, y in batches:
            optimizer.zero_grad()
            outputs = model(x)
            training.curvature.backward(cross_entropy(outputs, y), outputs)
            optimizer.step()
            schedule.step()
    if stop < EPOCHS:
        accelerator.save_state(folder)
    return weights(training.model)


def test_accelerate_takes_the_steps_of_the_plain_loop(expected):
    assert torch.equal(accelerated(Accelerator(cpu=True)), expected)


def test_accelerate_goes_on_from_a_checkpoint(expected, tmp_path):
    accelerated(Accelerator(cpu=True), stop=1, folder=tmp_path)
    assert torch.equal(accelerated(Accelerator(cpu=True), skip=1, folder=tmp_path), expected)


# Damping that adapts, around what the clients wrap the optimizer in.


def adaptive_step(curvature: GGN, model: nn.Module, adaptive: LevenbergMarquardt) -> float:
    """A step on the first batch, and its ratio."""
    x, y = next(iter(BATCHES))
    adaptive.optimizer.zero_grad()
    outputs = model(x)
    loss = cross_entropy(outputs, y)
    curvature.backward(loss, outputs)
    return adaptive.step(loss, lambda: cross_entropy(model(x), y))


def adaptive_run(training: Training, model: nn.Module, optimizer: object) -> tuple[list, Tensor]:
    adaptive = LevenbergMarquardt(optimizer)
    ratios = [adaptive_step(training.curvature, model, adaptive) for _ in range(4)]
    return [*ratios, training.optimizer.param_groups[0]["damping"]], weights(training.model)


class Adaptive(Manual):
    """Takes the steps of `adaptive_run` in its first training step."""

    def training_step(self, batch: list[Tensor]) -> None:
        if not hasattr(self, "found"):
            self.found = adaptive_run(self.training_of, self.model, self.optimizers())


@pytest.mark.parametrize("client", ["Lightning", "Accelerate"])
def test_damping_adapts_around_the_wrapped_optimizer(client):
    training = Training()
    expected = adaptive_run(training, training.model, training.optimizer)
    assert expected[0][-1] != training.optimizer.defaults["damping"]
    if client == "Lightning":
        module = Adaptive()
        trainer(epochs=1).fit(module, BATCHES)
        found = module.found
    else:
        training = Training()
        found = adaptive_run(
            training, *Accelerator(cpu=True).prepare(training.model, training.optimizer)
        )
    assert found[0] == expected[0]
    assert torch.equal(found[1], expected[1])


# skorch.


class Net(NeuralNetClassifier):
    """A net whose backward pass leaves products."""

    def initialize_optimizer(self) -> Net:
        self.curvature_ = GGN(layers(self.module_))
        self.optimizer_ = CGNOptimizer(
            self.module_.parameters(), self.curvature_, **self.get_params_for("optimizer")
        )
        return self

    def train_step_single(self, batch: object, **fit_params: object) -> dict[str, Tensor]:
        self._set_training(True)
        x, y = batch
        outputs = self.infer(x, **fit_params)
        loss = self.get_loss(outputs, y, X=x, training=True)
        self.curvature_.backward(loss, outputs)
        return {"loss": loss, "y_pred": outputs}


def test_skorch_takes_the_steps_of_the_plain_loop(expected):
    steps = EPOCHS * len(BATCHES)
    schedule = LRCallback(
        LinearLR, start_factor=1.0, end_factor=0.1, total_iters=steps, step_every="batch"
    )
    net = Net(
        Training().model,
        criterion=nn.CrossEntropyLoss,
        **{f"optimizer__{name}": value for name, value in OPTIONS.items()},
        lr=0.1,
        batch_size=BATCHES.batch_size,
        max_epochs=EPOCHS,
        train_split=None,
        callbacks=[schedule],
        verbose=0,
    )
    net.fit(IMAGES, LABELS)
    assert torch.equal(weights(net.module_), expected)


# Ignite.


def test_ignite_takes_the_steps_of_the_plain_loop(expected):
    training = Training()

    def update(engine: Engine, batch: list[Tensor]) -> float:
        x, y = batch
        training.optimizer.zero_grad()
        outputs = training.model(x)
        loss = cross_entropy(outputs, y)
        training.curvature.backward(loss, outputs)
        training.optimizer.step()
        return loss.item()

    engine = Engine(update)
    engine.add_event_handler(Events.ITERATION_STARTED, LRScheduler(training.schedule))
    engine.run(BATCHES, max_epochs=EPOCHS)
    assert torch.equal(weights(training.model), expected)
