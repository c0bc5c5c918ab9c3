"""The first promise over every layout: the same curve on 1, 2 and 4 processes, whole or in parts, stopped or not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.clips import write_clips
from tests.distributed.several import Command, several
from tests.launching import RECIPE, checkpoints, curve, make_project, train_until
from vaescale.runs.folder import read_metrics

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
STEPS, SHORT = 32, 8  # of the runs that others are compared with, and of those that are compared alone
OPTIONS = (
    f"training.steps={STEPS}",
    "training.precision=fp32",
    "training.log_every=1",
    "data.global_batch=32",
    # The rate at a step does not depend on the number of steps, and a short run has the whole one, too.
    *("optimizer.schedule=constant", "optimizer.warmup_steps=5", "likelihood.horizon_steps=100"),
)
ACCUMULATION = (1, 2)
LAYOUTS = ("ddp", "zero1", "zero2", "zero3", "fsdp2", "zero3_offload")
STOPPED = ("ddp", "zero3", "fsdp2")
# Accumulation is the harder case, and four processes take turns on two cores: one case of each way to share the weights is enough.
CASES = [(layout, 2, 1) for layout in STOPPED] + [(layout, 2, 2) for layout in LAYOUTS]
CASES += [("ddp", 4, 2), ("zero3", 4, 1), ("fsdp2", 4, 1)]
FROZEN = {1: ("ddp",), 2: ("ddp", "zero2", "zero3", "fsdp2"), 4: ()}
MAPPED = {1: ("ddp",), 2: ("zero2", "fsdp2"), 4: ()}
OF_LATENTS = {1: ("ddp",), 2: ("fsdp2",), 4: ()}
CODES = {1: ("ddp",), 2: ("ddp", "zero2", "zero3", "fsdp2"), 4: ()}
PRIORS = {1: ("ddp",), 2: ("ddp", "zero3", "fsdp2"), 4: ()}
SEQUENCES = {1: ("ddp",), 2: ("ddp", "zero3", "fsdp2"), 4: ("ddp",)}
CODE_STEPS = {"ddp": 50, "zero2": 12, "zero3": 12, "fsdp2": 12}
WHOLE = [("ddp", 1, accumulation) for accumulation in ACCUMULATION] + [(layout, 2, 1) for layout in STOPPED]


def needs(backend: str) -> None:
    if backend.startswith("zero"):
        for package in ("deepspeed", "transformers"):
            pytest.importorskip(
                package, reason=f"{package} is not installed (pip install 'vaescale[deepspeed]')"
            )


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """With `runs/LAYOUT-PROCESSES-ACCUMULATION` of all of them; `runs/ddp-1-ACCUMULATION` had one process."""
    needs("zero")
    folder = make_project(tmp_path_factory.mktemp("project"), digits)
    write_clips(folder / "data" / "clips")
    for processes in (1, 2, 4):
        cases = [case for case in dict.fromkeys((*WHOLE, *CASES)) if case[1] == processes]
        frozen = [training_of_a_decoder(layout, processes) for layout in FROZEN[processes]]
        mapped = [training_of_a_map(layout, processes) for layout in MAPPED[processes]]
        latents = [training_of_latents(layout, processes) for layout in OF_LATENTS[processes]]
        if processes == 1:
            latents.insert(0, Command("ddp", ["encode", "runs/ddp-1-1"]))
        codes = [training_of_codes(layout, processes) for layout in CODES[processes]]
        priors = [training_of_a_prior(folder, layout, processes) for layout in PRIORS[processes]]
        clips = [training_of_sequences(layout, processes) for layout in SEQUENCES[processes]]
        clips += judging_of_sequences(processes)
        commands = [*(training(*case) for case in cases), *frozen, *codes, *priors, *mapped, *latents, *clips]
        several(folder, commands, processes=processes)
    return folder


def training(layout: str, processes: int, accumulation: int) -> Command:
    run = f"runs/{layout}-{processes}-{accumulation}"
    steps = STEPS if (layout, processes, accumulation) in WHOLE else SHORT
    words = [*OPTIONS, f"training.accumulation={accumulation}", f"training.steps={steps}"]
    return Command(layout, ["train", RECIPE, "tracking.mlflow=null", *words, f"run_dir={run}"])


def training_of_a_decoder(layout: str, processes: int) -> Command:
    """20 steps that begin from the first run's weights, with a frozen encoder, and against a discriminator from the fifth on."""
    words = [*OPTIONS, "training.steps=20", "init_from=runs/ddp-1-1", "network.freeze=encoder"]
    words += [
        "training.ema_more=[0.5]",
        "objective.adversarial.start_step=4",
        "objective.adversarial.widths=[8]",
    ]
    words += ["objective.adversarial.adaptive=false"]  # which only ddp allows
    run = f"runs/frozen-{layout}-{processes}"
    return Command(layout, ["train", RECIPE, "tracking.mlflow=null", *words, f"run_dir={run}"])


def training_of_a_map(layout: str, processes: int) -> Command:
    """A latent map with a term that decodes its transformations."""
    words = [*OPTIONS, f"training.steps={SHORT}", "objective.equivariance={}", "network.kind=resnet"]
    words += ["network.latent_dim=2", "network.width=4", "network.multipliers=[1,2]", "network.blocks=1"]
    run = f"runs/mapped-{layout}-{processes}"
    return Command(layout, ["train", RECIPE, "tracking.mlflow=null", *words, f"run_dir={run}"])


def training_of_latents(layout: str, processes: int) -> Command:
    """A model of the first run's latents."""
    words = [*OPTIONS, f"training.steps={SHORT}", "data.holds=latents"]
    words += ["data.image_size=1", "data.channels=16"]
    words += [f"data.{split}=runs/ddp-1-1/latents/{split}" for split in ("train", "val")]
    words += ["network.kind=mlp", "network.latent_dim=3", "network.widths=[8]", "likelihood.mean=identity"]
    run = f"runs/latents-{layout}-{processes}"
    return Command(layout, ["train", RECIPE, "tracking.mlflow=null", *words, f"run_dir={run}"])


def training_of_codes(layout: str, processes: int) -> Command:
    """A codebook that starts at the second step and has codes that restart at steps 6, 10, 14, ... ."""
    words = [*OPTIONS, f"training.steps={CODE_STEPS[layout]}", "training.accumulation=2"]
    words += ["network.latent_map=true", "network.latent_dim=3", "network.widths=[16]"]
    words += ["posterior={kind: quantized, codes: 64, decay: 0.8, start_step: 2, restart_every: 4}"]
    run = f"runs/codes-{layout}-{processes}"
    return Command(layout, ["train", RECIPE, "tracking.mlflow=null", *words, f"run_dir={run}"])


def training_of_sequences(layout: str, processes: int) -> Command:
    """A model of sequences with a learned prior; 21 sequences are held out, which processes cannot share equally."""
    words = [
        *OPTIONS,
        f"training.steps={SHORT}",
        "data.holds=sequences",
        "data.frames=4",
        "data.global_batch=16",
    ]
    words += [f"data.{split}=data/clips/{split}" for split in ("train", "val")]
    words += [
        "network={kind: svg, context: 2, horizon: 2, latent_dim: 3, features: 8, hidden: 8, widths: [4, 8]}"
    ]
    run = f"runs/sequences-{layout}-{processes}"
    return Command(layout, ["train", RECIPE, "tracking.mlflow=null", *words, f"run_dir={run}"])


def judging_of_sequences(processes: int) -> list[Command]:
    """The distance of the futures of one process' run, by features of frames and of videos; each time with its own reference."""
    words = ["evaluate", "runs/sequences-ddp-1", "--futures", "1", "--features", "features/clips"]
    words += ["--name", f"judged-{processes}", "--cache", f"data/cache-{processes}"]
    training = ["train-features", "data/clips/train", "--out", "features/clips", "--frames", "4"]
    judged = [Command("ddp", words)] if processes < 4 else []
    return ([Command("ddp", [*training, "--steps", "2", "--width", "4"])] if processes == 1 else []) + judged


def training_of_a_prior(folder: Path, layout: str, processes: int) -> Command:
    """A prior over the codes of one process' run, and of copies of this run."""
    run = "runs/codes-ddp-1"
    if processes > 1:
        copy = f"runs/prior-{layout}-{processes}"
        shutil.copytree(folder / run, folder / copy, ignore=shutil.ignore_patterns("prior", "latents"))
        run = copy
    words = ["--width", "16", "--layers", "1", "--heads", "2", "--steps", str(SHORT), "--batch", "32"]
    return Command(layout, ["fit-prior", run, *words])


def assert_same_curve(one: Path, other: Path, *, steps: int = STEPS, rel: float = 1e-4) -> None:
    rows = list(zip(curve(one)[:steps], curve(other), strict=True))
    assert len(rows) == steps
    for a, b in rows:
        for metric in ("train/neg_elbo_nats", "train/sigma", "train/kl_nats", "train/grad_norm"):
            assert b[metric] == pytest.approx(a[metric], rel=rel), (a["step"], metric)


@pytest.mark.parametrize(("layout", "processes", "accumulation"), CASES)
def test_every_layout_gives_the_same_curve(
    project: Path, layout: str, processes: int, accumulation: int
) -> None:
    run = project / f"runs/{layout}-{processes}-{accumulation}"
    steps = STEPS if (layout, processes, accumulation) in WHOLE else SHORT
    assert_same_curve(project / f"runs/ddp-1-{accumulation}", run, steps=steps)
    tags = json.loads((run / "run.json").read_text())
    assert (tags["layout"], tags["world_size"]) == (layout.removesuffix("_offload"), processes)


@pytest.fixture(scope="module")
def resumed(project: Path) -> Path:
    """With `runs/parts-LAYOUT`: stopped by a signal that one rank got, and trained to the end in new processes."""
    options = ["train", RECIPE, "tracking.mlflow=null", *OPTIONS]
    for rows in (12, 0):
        commands = [Command(layout, [*options, f"run_dir=runs/parts-{layout}"], rows) for layout in STOPPED]
        several(project, commands, processes=2)
        for layout in STOPPED if rows else ():
            (saved,) = checkpoints(project / f"runs/parts-{layout}")
            assert rows <= int(saved.removeprefix("step-")) < STEPS
    return project


@pytest.mark.parametrize("layout", STOPPED)
def test_on_one_number_resuming_is_bit_equal(resumed: Path, layout: str) -> None:
    """Weights, averages, moments, sigma and every metric, after a stop that the cluster asked for."""
    whole, parts = resumed / f"runs/{layout}-2-1", resumed / f"runs/parts-{layout}"
    for a, b in zip(curve(whole), curve(parts), strict=True):
        metrics = [name for name in a if name.startswith("train/")]
        assert {name: a[name] for name in metrics} == {name: b[name] for name in metrics}
    for name in ("model", "ema", "optimizer", "guard"):
        one, other = (
            load_file(run / f"checkpoints/step-{STEPS:09d}" / f"{name}.safetensors") for run in (whole, parts)
        )
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name


def test_one_run_over_every_layout_is_the_run_that_never_stopped(project: Path) -> None:
    """1 -> ZeRO-3 on 2 -> FSDP2 on 4 -> DDP on 2, each leg ended by a signal; that of ZeRO-3 to `vaescale launch`."""
    run, options = project / "runs/legs", (*OPTIONS, "training.accumulation=2")
    words = ["train", RECIPE, "tracking.mlflow=null", *options, "run_dir=runs/legs"]

    def assert_no_step_is_lost(rows: int) -> None:
        assert rows <= len(curve(run)) < STEPS
        assert int(checkpoints(run)[-1].removeprefix("step-")) == len(curve(run))

    several(project, [Command("ddp", words, stop_after=8)])
    assert_no_step_is_lost(8)
    code, said = train_until(project, run, 16, *options, backend="zero3", launch=True)
    assert code == 75, said
    assert "saving after this step" in said, said
    assert "Traceback" not in said
    assert_no_step_is_lost(16)
    several(project, [Command("fsdp2", words, stop_after=24)], processes=4)
    assert_no_step_is_lost(24)
    several(project, [Command("ddp", words)], processes=2)
    assert_same_curve(project / "runs/ddp-1-2", run)


@pytest.mark.parametrize("layout", MAPPED[2])
def test_the_transformed_term_is_the_same_on_two_processes(project: Path, layout: str) -> None:
    one, two = project / "runs/mapped-ddp-1", project / f"runs/mapped-{layout}-2"
    assert_same_curve(one, two, steps=SHORT)
    for a, b in zip(curve(one), curve(two), strict=True):
        assert b["train/equivariance"] == pytest.approx(a["train/equivariance"], rel=1e-4)


@pytest.mark.parametrize("layout", OF_LATENTS[2])
def test_the_draws_of_latents_are_the_same_on_two_processes(project: Path, layout: str) -> None:
    assert_same_curve(project / "runs/latents-ddp-1", project / f"runs/latents-{layout}-2", steps=SHORT)


@pytest.mark.parametrize(
    ("layout", "processes"), [(one, number) for number in (2, 4) for one in SEQUENCES[number]]
)
def test_sequences_have_one_curve(project: Path, layout: str, processes: int) -> None:
    """Windows, latents over time and sigma over all predicted frames; and held-out sequences that padding follows."""
    runs = [project / f"runs/sequences-{name}" for name in ("ddp-1", f"{layout}-{processes}")]
    assert_same_curve(*runs, steps=SHORT)
    held_out = [read_metrics(run)[-1] for run in runs]
    for metric in ("val/neg_elbo_nats", "val/kl_nats", "val/mse", "val/data_sigma"):
        assert held_out[1][metric] == pytest.approx(held_out[0][metric], rel=1e-4), metric


def test_futures_have_one_distance(project: Path) -> None:
    judged = project / "runs/sequences-ddp-1/evaluation"
    one, two = (json.loads((judged / f"judged-{processes}.json").read_text()) for processes in (1, 2))
    for metric, value in one["metrics"].items():
        if metric.startswith("frechet_"):
            assert two["metrics"][metric] == pytest.approx(value, rel=1e-6), metric
    assert len(one["frechet"]) == 4


@pytest.mark.parametrize("layout", FROZEN[2])
def test_a_frozen_encoder_keeps_its_bits(project: Path, layout: str) -> None:
    """The decoder alone is trained, averaged and in the optimizer, in every layout with one curve."""
    run = project / f"runs/frozen-{layout}-2"
    assert_same_curve(project / "runs/frozen-ddp-1", run, steps=20)
    source = load_file(project / f"runs/ddp-1-1/checkpoints/step-{STEPS:09d}/ema.safetensors")
    saved = {
        name: load_file(run / "checkpoints/step-000000020" / f"{name}.safetensors")
        for name in ("model", "ema", "ema-0.5", "optimizer")
    }
    alone = load_file(project / "runs/frozen-ddp-1/checkpoints/step-000000020/ema-0.5.safetensors")
    for name, value in source.items():
        if name.startswith("network."):
            is_frozen = name.startswith("network.encoder.")
            for weights in ("model", "ema", "ema-0.5"):
                assert torch.equal(saved[weights][name], value) == is_frozen, (weights, name)
            torch.testing.assert_close(saved["ema-0.5"][name], alone[name], rtol=1e-3, atol=1e-4)
            assert (f"{name}/exp_avg" in saved["optimizer"]) != is_frozen
    assert not torch.equal(
        saved["model"]["network.decoder.0.weight"], saved["ema"]["network.decoder.0.weight"]
    )


@pytest.mark.parametrize("layout", CODES[2])
def test_codes_have_one_curve_and_one_codebook(project: Path, layout: str) -> None:
    """On two processes as on one: the bound, the codebook, the use of each code and which codes restart."""
    run, steps = project / f"runs/codes-{layout}-2", CODE_STEPS[layout]
    rows = list(zip(curve(project / "runs/codes-ddp-1")[:steps], curve(run), strict=True))
    for a, b in rows:
        for metric in (
            "train/neg_elbo_nats",
            "train/sigma",
            "train/commitment_nats",
            "train/code_perplexity",
        ):
            assert b[metric] == pytest.approx(a[metric], rel=1e-4), (a["step"], metric)
    if layout == "ddp":
        for name in ("model", "ema"):
            one, two = (
                load_file(
                    project / f"runs/codes-ddp-{number}/checkpoints/step-{steps:09d}/{name}.safetensors"
                )
                for number in (1, 2)
            )
            for key in ("vectors", "counts", "sums"):
                torch.testing.assert_close(
                    two[f"quantizer.{key}"], one[f"quantizer.{key}"], rtol=1e-4, atol=1e-5, msg=key
                )


@pytest.mark.parametrize("layout", PRIORS[2])
def test_a_prior_over_codes_has_one_curve(project: Path, layout: str) -> None:
    """Two processes write the codes that one writes, and train on them what one trains."""
    one, two = (project / f"runs/{run}/prior" for run in ("codes-ddp-1", f"prior-{layout}-2"))
    trained = [next(run.glob("*-prior")) for run in (one, two)]
    tags = [json.loads((run / "run.json").read_text()) for run in trained]
    assert [tag["world_size"] for tag in tags] == [1, 2]
    assert tags[0]["data_hash"] == tags[1]["data_hash"]
    rows = list(zip(*map(curve, trained), strict=True))
    assert len(rows) == SHORT
    for a, b in rows:
        for metric in ("train/neg_elbo_nats", "train/grad_norm", "train/lr"):
            assert b[metric] == pytest.approx(a[metric], rel=1e-4), (a["step"], metric)
    results = [json.loads((run / "result.json").read_text()) for run in (one, two)]
    assert results[1]["prior/val_code_nats"] == pytest.approx(results[0]["prior/val_code_nats"], rel=1e-4)
