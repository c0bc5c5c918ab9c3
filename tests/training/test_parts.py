"""The small parts of training: the launch's checks, the optimizer, the average, the clock, the memory estimate."""

import pytest
import torch

from vaescale.errors import UserError
from vaescale.models.vae import VAE
from vaescale.recipe import Recipe
from vaescale.system import native
from vaescale.system.host import system_metrics
from vaescale.system.uncompiled import Adam
from vaescale.trained import build_model
from vaescale.training.clock import Clock
from vaescale.training.config import OptimizerConfig
from vaescale.training.launch import refuse_lost_processes, start
from vaescale.training.memory import estimate
from vaescale.training.optimizer import build_optimizer, change_of_rate, learning_rate
from vaescale.training.utilization import flops_of_an_image


@pytest.fixture
def model(recipe_content) -> VAE:
    return build_model(Recipe.model_validate(recipe_content))


def test_what_a_launcher_would_lose_in_silence_is_refused(monkeypatch) -> None:
    launched = {"ACCELERATE_MIXED_PRECISION": "no"}
    refuse_lost_processes({})
    refuse_lost_processes(launched)
    refuse_lost_processes({**launched, "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"})
    with pytest.raises(UserError, match="launcher started one"):
        refuse_lost_processes({**launched, "MASTER_ADDR": "127.0.0.1"})


REFUSED = {
    "zero_stage 0": {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"},
    "fsdp_version 1": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"},
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_layout_that_there_is_not_is_refused(monkeypatch, what: str) -> None:
    if what.startswith("zero"):
        pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    for name, value in REFUSED[what].items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=what):
        start()


def test_weight_decay_spares_biases_and_norms(model: VAE) -> None:
    optimizer = build_optimizer(model, OptimizerConfig(lr=1e-3, weight_decay=0.1))
    decayed, spared = optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))
    assert type(build_optimizer(model, OptimizerConfig(kind="adam", lr=1e-3))) is Adam


def test_the_learning_rate_follows_the_schedule() -> None:
    config = OptimizerConfig(lr=0.5, warmup_steps=2)
    assert [learning_rate(step, config, total_steps=10) for step in (0, 1, 2, 9)] == [0.25, 0.5, 0.5, 0.0]
    assert learning_rate(9, OptimizerConfig(lr=0.5, schedule="constant"), total_steps=10) == 0.5
    short = OptimizerConfig(lr=0.5, warmup_steps=2, final_fraction=0.1)
    assert [learning_rate(step, short, total_steps=3) for step in range(3)] == [0.25, 0.5, 0.05], (
        "the last step is the last"
    )
    anew = OptimizerConfig(lr=0.5, warmup_steps=2, schedule_start=10)
    assert [learning_rate(step, anew, total_steps=20) for step in (10, 11, 12, 19)] == [0.25, 0.5, 0.5, 0.0]


def test_a_rate_that_rises_where_a_run_goes_on_is_said() -> None:
    cosine, flat = OptimizerConfig(lr=0.5), OptimizerConfig(lr=0.5, schedule="constant")
    said = change_of_rate((cosine, 20), (cosine, 40), step=20)
    assert said is not None
    assert "rises from 0 to 0.24" in said
    assert "optimizer.schedule_start=20" in said
    assert change_of_rate((cosine, 20), (cosine, 20), step=10) is None
    assert change_of_rate((cosine, 20), (flat.model_copy(update={"lr": 0.2}), 40), step=10) is None
    assert change_of_rate((flat, 20), (flat, 40), step=20) is None


def test_the_clock_counts_batches_and_passes_them_on() -> None:
    clock = Clock()
    assert list(clock.waiting_for("abc")) == ["a", "b", "c"]
    metrics = clock.metrics(10)
    assert metrics["perf/images_per_second"] == pytest.approx(10 / metrics["perf/step_seconds"])
    assert 0 <= metrics["perf/data_wait_fraction"] <= 1
    assert metrics["perf/memory_bytes"] > 0


def test_the_operations_of_an_image_are_those_of_its_products(recipe_content) -> None:
    """Linear layers of 64 to 2 and of 2 to 64: both forward, both gradients of weights, and that of the decoder's input."""
    recipe_content["network"] = {"kind": "linear", "latent_dim": 2}
    own = build_model(Recipe.model_validate(recipe_content))
    assert flops_of_an_image(own) == (2 + 3) * 2 * 64 * 2


def test_what_is_recomputed_is_no_operation_of_the_model(recipe_content) -> None:
    counts = []
    for checkpointing in (False, True):
        network = {"kind": "ladder", "latent_dim": 2, "width": 16, "checkpointing": checkpointing}
        counts.append(
            flops_of_an_image(build_model(Recipe.model_validate(recipe_content | {"network": network})))
        )
    assert counts[0] == counts[1] > 1e6


def test_the_machine_s_use_is_in_percent() -> None:
    found = system_metrics()
    shares = [value for name, value in found.items() if name.endswith("percentage")]
    assert len(shares) >= 2
    assert all(0 <= share <= 100 for share in shares)
    assert 0 < found["system/system_memory_usage_megabytes"] < 1e9


def test_the_memory_estimate_adds_up_and_grows_in_a_line(model: VAE) -> None:
    one, two, ten = (estimate(model, images=n, averages=1, precision="fp32") for n in (1, 2, 10))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert one["weights"] == one["gradients"] == one["ema"] == 4 * parameters
    assert one["optimizer"] == 8 * parameters
    own = sum(value for name, value in one.items() if name != "peak")
    assert one["peak"] == own - min(one["gradients"], one["activations"]), "the one takes the other's place"
    several = estimate(model, images=1, averages=1, precision="fp32", accumulation=2)
    assert several["peak"] == own
    slope = two["activations"] - one["activations"]
    assert slope > 64 * 4  # at least the image itself, in float32
    assert ten["activations"] == one["activations"] + 9 * slope
    assert estimate(model, images=1, averages=0, precision="fp32")["ema"] == 0


def test_the_memory_estimate_divides_what_a_layout_divides(model: VAE) -> None:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    found = {
        layout: estimate(model, images=1, averages=1, precision="fp32", layout=layout, processes=4)
        for layout in ("ddp", "zero1", "zero2", "zero3", "fsdp2")
    }
    for layout, parts in found.items():
        share = 1 if layout == "ddp" else 4
        assert parts["ema"] == -(-4 * parameters // share)
        assert parts["optimizer"] == 2 * parts["ema"]
    assert found["zero1"]["weights"] == found["zero2"]["weights"] == 4 * parameters + found["zero1"]["ema"]
    assert found["fsdp2"]["weights"] == found["fsdp2"]["gradients"] == found["fsdp2"]["ema"]


def test_the_memory_estimate_knows_checkpointing(recipe_content) -> None:
    """A checkpointed block keeps its input alone, and not what its four convolutions save."""
    sizes = []
    for checkpointing in (False, True):
        network = {"kind": "ladder", "latent_dim": 2, "width": 16, "checkpointing": checkpointing}
        model = build_model(Recipe.model_validate(recipe_content | {"network": network}))
        sizes.append(estimate(model, images=8, averages=1, precision="fp32")["activations"])
    assert 0 < sizes[1] < sizes[0] / 2


def test_the_memory_estimate_is_what_autograd_saves(recipe_content) -> None:
    """One linear layer of 64 to 64 saves its input and what the mean, the KL and the likelihood need, little more."""
    network = {"kind": "linear", "latent_dim": 2}
    likelihood = {"kind": "gaussian", "sigma": 1.0}
    model = build_model(
        Recipe.model_validate(recipe_content | {"network": network, "likelihood": likelihood})
    )
    one, two = (estimate(model, images=n, averages=0, precision="fp32")["activations"] for n in (1, 2))
    assert 2 * 64 * 4 <= two - one <= 12 * 64 * 4


def test_the_memory_estimate_knows_the_precision(recipe_content) -> None:
    """By torch's operations fp16 keeps what bf16 keeps: activations of two bytes a value, where fp32 and tf32 keep four."""
    network = {"kind": "ladder", "latent_dim": 2, "width": 16}
    model = build_model(Recipe.model_validate(recipe_content | {"network": network}))
    with native.switched_off():
        activations = {
            precision: estimate(model, images=8, averages=1, precision=precision)["activations"]
            for precision in ("fp32", "tf32", "bf16", "fp16")
        }
    assert activations["fp16"] == activations["bf16"] < 0.8 * activations["fp32"]
    assert activations["tf32"] == activations["fp32"]


def test_the_memory_estimate_neither_copies_nor_changes_the_model(recipe_content, monkeypatch) -> None:
    """A model that just fits on the device has no room for a copy, and its running statistics are training's."""
    network = {"kind": "conv", "latent_dim": 2, "preset": "infogan"}
    content = recipe_content | {"network": network, "objective": {"spectral": 0.1}}
    content["data"] |= {"image_size": 8}
    model = build_model(Recipe.model_validate(content))
    model.eval()
    model.likelihood.train()
    flags = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pending = list(model.likelihood.state._pending)

    def refuse(*_: object) -> None:
        raise AssertionError("the model is copied")

    monkeypatch.setattr(VAE, "__deepcopy__", refuse, raising=False)
    estimate(model, images=2, averages=1, precision="fp32")
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.likelihood.state._pending == pending == []
