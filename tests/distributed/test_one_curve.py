"""One process, two and four give the same curve where it is hard: damaged data, wide images, classes, vectors, ladders, statistics over the batch, two players."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.distributed.several import Command, several
from tests.launching import RECIPE, curve, finished, make_project
from vaescale.commands.make_shards import make_shards
from vaescale.runs.folder import read_metrics

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
TWO = ("accelerate.commands.launch", "--config_file", "recipes/backends/cpu2.yaml")


def launch(folder: Path, *words: str, launcher: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """`vaescale train recipes/digits/optimal.yaml` in a folder that holds the recipes and the data."""
    return finished([sys.executable, "-m", *launcher, "-m", "vaescale", "train", RECIPE, *words], folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    folder = make_project(tmp_path_factory.mktemp("project"), digits)
    damaged = shutil.copytree(digits / "train", folder / "data" / "damaged")
    entries = np.load(damaged / "shard-000000.index.npy")[::100]
    with (damaged / "shard-000000.tar").open("r+b") as tar:
        for entry in entries:
            tar.seek(entry["offset"] + 100)
            tar.write(b"damaged")
    make_shards("digits", folder / "data/few", limit=300, jobs=1)
    (folder / "vectors.csv").write_text("".join(f"{n:06d},{n % 7},{n % 5}\n" for n in range(1797)))
    make_shards("digits", folder / "data/digits32", dtype="float32", jobs=1)
    make_shards("digits", folder / "data/digits16", dtype="uint16", vectors=folder / "vectors.csv", jobs=1)
    return folder


HARD = (
    *("likelihood.dequantize=true", "training.accumulation=2", "data.flip=true", "data.shuffle_block=100"),
    *(
        "data.train=[{path: data/damaged, weight: 3}, {path: data/digits/val, weight: 1}]",
        "data.val=data/few/val",
        *("data.image_size=[4,8]", "data.crop=aspect"),
        "data.max_skipped=0.1",
    ),
    *("condition.kind=class", "condition.classes=10", "condition.dropout=0.2", "condition.prior=true"),
)


LADDER = (
    *("network.kind=ladder", "network.latent_dim=2", "network.width=16", "network.checkpointing=true"),
    *("posterior.kind=relative", "objective.free_bits.nats=0.2", "optimizer.skip_factor=1.2"),
    *("condition.kind=class", "condition.classes=10", "condition.dropout=0.2"),
)
INFOGAN = (
    *(
        "data.train=data/digits32/train",
        "data.val=data/digits32/val",
        "data.dtype=float32",
        "data.range=[0,1]",
    ),
    "network.widths=null",
    "network.preset=infogan",
    "objective.dip.variant=ii",
    "objective.mmd.weight=5",
)
PLAYERS = (
    *(
        "data.global_batch=32",
        "network.widths=[16,32]",
        "objective.adversarial.widths=[16,32]",
        "optimizer.lr=5e-4",
    ),
    *(
        "objective.adversarial.start_step=10",
        "objective.adversarial.steps_per_step=2",
        "training.accumulation=2",
    ),
    *(
        "objective.adversarial.augment=[colour,translation,cutout]",
        "objective.adversarial.spectral_norm=true",
    ),
    *("objective.adversarial.r1=1", "objective.adversarial.r2=0.5", "objective.adversarial.lecam=0.1"),
    *("training.checkpoint_every=25", "training.compare_replicas_every=25"),
    *("data.balance=class", "data.augment.shift=1", "data.augment.jitter.contrast=0.2"),
)
# Early stopping ends it at 10 of its 20 steps, on every rank.
DEEP = (
    *(
        "training.evaluate_every=5",
        "training.early_stopping.patience=1",
        "training.early_stopping.min_delta=1e6",
    ),
    *("data.train=data/digits16/train", "data.val=data/digits16/val", "data.dtype=uint16", "data.flip=true"),
    "likelihood.kind=bitwise",
    *("condition.kind=vector", "condition.size=2", "condition.member=vector.npy", "condition.dropout=0.2"),
)
# That with BatchNorm is large: it makes 1e-3 of float32's rounding within 20 steps.
STEPS = {
    "hard": 30,
    "16 bits, one by one": 10,
    "ladder": 20,
    "floats, batch norm, dip and mmd": 5,
    "players": 50,
}
ASKED = STEPS | {"16 bits, one by one": 20}
EXTRAS = {
    "hard": HARD,
    "16 bits, one by one": DEEP,
    "ladder": LADDER,
    "floats, batch norm, dip and mmd": INFOGAN,
    "players": PLAYERS,
}


@pytest.fixture(scope="module")
def runs(folder: Path) -> Path:
    """With `runs/one/NAME` and `runs/two/NAME`, of one process and of two, and `runs/resumed/N`, in which that of one process goes on on N. hard: of two sets, one
    process has everything in memory, two read from disk with workers; some images are damaged. players: with balanced classes and augmented images.
    """
    for processes, number in ((1, "one"), (2, "two")):
        commands = []
        for name, extra in EXTRAS.items():
            options = ["training.precision=fp32", "training.log_every=1", "tracking.mlflow=null", *extra]
            if name == "hard" and processes == 2:
                options += ["data.cache=none", "data.workers=2"]
            options += [f"training.steps={ASKED[name]}", f"run_dir=runs/{number}/{name}"]
            words = ["train", RECIPE, *options, "--expect-processes", str(processes), "--json"]
            commands.append(Command("ddp", words))
        for name, printed in zip(EXTRAS, several(folder, commands, processes=processes), strict=True):
            assert json.loads(printed)["step"] == STEPS[name], "one JSON object, from one of the processes"
    for count in (2, 4):
        resumed = shutil.copytree(folder / "runs/one/players", folder / f"runs/resumed/{count}")
        shutil.rmtree(resumed / "checkpoints/step-000000050")
        replaced = {"run_dir=runs/two/players": f"run_dir=runs/resumed/{count}", "2": str(count)}
        several(folder, [Command("ddp", [replaced.get(word, word) for word in words])], processes=count)
    return folder / "runs"


@pytest.mark.parametrize("name", EXTRAS)
def test_one_and_two_processes_give_the_same_curve(runs: Path, name: str) -> None:
    tags = [json.loads((runs / number / name / "run.json").read_text()) for number in ("one", "two")]
    assert [tag["world_size"] for tag in tags] == [1, 2]
    assert tags[0]["recipe_hash"] == tags[1]["recipe_hash"]
    rows = list(zip(curve(runs / "one" / name), curve(runs / "two" / name), strict=True))
    assert len(rows) == STEPS[name]
    for a, b in rows:
        assert a["step"] == b["step"]
        assert a.get("data/skipped/changed") == b.get("data/skipped/changed")
        of_sigma = [] if "one by one" in name else ["train/sigma"]  # bits have no sigma
        for metric in ("train/neg_elbo_nats", "train/kl_nats", "train/grad_norm", *of_sigma):
            assert b[metric] == pytest.approx(a[metric], rel=1e-4), (a["step"], metric)
    held_out = [read_metrics(runs / number / name)[-1] for number in ("one", "two")]
    for metric in ("val/neg_elbo_nats", "val/mse"):
        assert held_out[1][metric] == pytest.approx(held_out[0][metric], rel=1e-5)
    assert bool(rows[-1][0].get("data/skipped/changed")) == (name == "hard")
    if name == "ladder":
        skipped = [[row[rank]["train/skipped_steps"] for row in rows] for rank in (0, 1)]
        assert skipped[0] == skipped[1]


def test_two_players_are_the_same_on_one_process_and_two_and_after_a_resume_on_two_and_four(
    runs: Path,
) -> None:
    """The penalties' gradients jump where a LeakyReLU changes its sign, so a last bit can become 2e-4 within 50 steps: one process in which
    torch uses other instructions differs as much. So two processes are compared for 25 steps, and for 25 more after they start again from
    the state of one."""
    whole = curve(runs / "one/players")
    for count in (2, 4):
        assert json.loads((runs / f"resumed/{count}/run.json").read_text())["world_size"] == count
    begun, *resumed = (curve(runs / name) for name in ("two/players", "resumed/2", "resumed/4"))
    assert [len(rows) for rows in (whole, begun, *resumed)] == [50] * 4
    for first, other in ((whole[:25], begun[:25]), *((whole, rows) for rows in resumed)):
        for a, b in zip(first, other, strict=True):
            players = [name for name in a if "adversar" in name or "discriminator" in name]
            assert len(players) == (6 if a["step"] > 10 else 0)
            for name in players:
                assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-5), (a["step"], name)
            assert b["train/loss_nats"] == pytest.approx(a["train/loss_nats"], rel=1e-4), a["step"]


def test_the_launcher_s_silent_one_process_fallback_is_refused(folder: Path) -> None:
    cpu = ("accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1")
    outcome = launch(folder, "run_dir=runs/lost", launcher=cpu)
    assert outcome.returncode != 0
    assert "several processes were asked for and the launcher started one" in outcome.stderr
    assert not (folder / "runs/lost").exists()


def test_a_fault_on_two_processes_is_said_once(folder: Path) -> None:
    outcome = launch(folder, "run_dir=runs/odd", "data.global_batch=127", launcher=TWO)
    assert outcome.returncode != 0
    assert outcome.stderr.count("data.global_batch (=127) cannot be shared equally by 2 processes") == 1
