"""One rank under NCCL: each launcher and layout trains as a plain process does."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.gpu.conftest import NEEDS_GPU, ON_GPU, assert_same_curve
from vaescale.runs.folder import read_json

pytestmark = NEEDS_GPU
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", "-m", "vaescale")
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
LAUNCHES: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "torchrun, ddp": (TORCHRUN, {}),
    "torchrun, fsdp2": (TORCHRUN, FSDP2),
    "launch, fsdp2": (("-m", "vaescale", "launch", "--processes", "1", "--backend", "fsdp2"), {}),
    "launch, ddp": (("-m", "vaescale", "launch", "--processes", "1", "--backend", "ddp"), {}),
}
if importlib.util.find_spec("deepspeed"):
    LAUNCHES |= {
        f"launch, zero{stage}": (
            ("-m", "vaescale", "launch", "--processes", "1", "--backend", f"zero{stage}"),
            {},
        )
        for stage in (1, 2, 3)
    }
SHORT = ("training.log_every=1", "training.evaluate_every=10", "training.checkpoint_every=10")
PATIENCE_SECONDS = 150


@pytest.fixture(scope="module")
def started(
    words: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[Path, "subprocess.Popen[str]"]]]:
    """All launches, at once: most of their time is the import of torch."""
    processes = {}
    for name, (launcher, variables) in LAUNCHES.items():
        folder = tmp_path_factory.mktemp("launches")
        kept = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith("ACCELERATE") and (not ON_GPU or key != "DS_ACCELERATOR")
        }
        with (folder / "words.log").open("w") as log:
            processes[name] = (
                folder,
                subprocess.Popen(
                    [sys.executable, *launcher, *words(folder / "run", *SHORT, steps=10)],
                    cwd=folder,
                    env=kept
                    | variables
                    | {
                        "OMP_NUM_THREADS": "1",
                        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
                        "NCCL_DEBUG": "VERSION",
                    },
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    text=True,
                ),
            )
    yield processes
    for _, process in processes.values():
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAUNCHES)
def test_one_rank_has_the_curve_of_a_plain_process(name: str, started, trained) -> None:
    folder, process = started[name]
    reference = trained("gpu", *SHORT, steps=10)
    code = process.wait(PATIENCE_SECONDS)
    log = (folder / "words.log").read_text()
    assert code == 0, log
    assert_same_curve(folder / "run", reference, "train/loss_nats", rtol=1e-5, atol=1e-3)
    assert_same_curve(folder / "run", reference, "train/grad_norm", rtol=1e-4, atol=1e-3)
    assert_same_curve(folder / "run", reference, "train/sigma", rtol=1e-5, atol=0)
    assert_same_curve(folder / "run", reference, "val/neg_elbo_nats", rtol=0, atol=1e-3)
    assert read_json(folder / "run" / "run.json")["layout"] == name.partition(", ")[2]
    if ON_GPU and name.startswith("torchrun"):
        assert "NCCL version" in log, log
    assert "Warning" not in log, log
