"""An exported MLflow model: what it answers and refuses, what it brings along, and who may read it."""

import importlib.metadata
import json
import logging
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.requirements import Requirement

from vaescale.commands.export import export
from vaescale.commands.served import PACKAGES, _load_pyfunc
from vaescale.errors import UserError
from vaescale.runs.requests import LOGGER
from vaescale.system.files import make_readable

EXAMPLE = Path(__file__).parents[2] / "docs/examples"


@pytest.fixture(scope="module")
def exported(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("served") / "model"
    export(trained_run, out)
    return out


@pytest.fixture
def ask(exported: Path) -> Callable[..., tuple[int, Any]]:
    """Send a request to MLflow's scoring server, as its web framework does. Returns status and answer."""
    import mlflow
    from mlflow.exceptions import MlflowException
    from mlflow.pyfunc import scoring_server

    before = list(sys.path)
    model = mlflow.pyfunc.load_model(str(exported))
    sys.path[:] = before

    def send(inputs: Any, params: dict[str, Any] | None = None) -> tuple[int, Any]:
        body = json.dumps({"inputs": inputs, **({"params": params} if params else {})})
        try:
            answer = scoring_server.invocations(
                body, "application/json", model, model.metadata.get_input_schema()
            )
        except MlflowException as error:
            return error.get_http_status_code(), json.loads(error.serialize_as_json())["message"]
        return answer.status, np.array(json.loads(answer.response)["predictions"])

    return send


@pytest.mark.filterwarnings("ignore")  # MLflow warns of itself
def test_every_form_of_a_request_gets_one_answer(ask: Callable[..., tuple[int, Any]]) -> None:
    x = np.random.default_rng(0).integers(0, 256, (3, 1, 8, 8))
    status, expected = ask(x.tolist())
    assert (status, expected.shape) == (200, (3, 1, 8, 8))
    np.testing.assert_array_equal(ask((x / 255).tolist())[1], expected)
    np.testing.assert_allclose(
        ask(np.moveaxis(x, 1, -1).tolist())[1], np.moveaxis(expected, 1, -1), atol=1e-6
    )
    np.testing.assert_allclose(ask(x[1, 0].tolist())[1], expected[1:2], atol=1e-6)
    assert ask(x.tolist(), {"mode": "encode"})[1].shape == (3, 4)
    assert ask(x.tolist(), {"mode": "sample", "seed": 2, "temperature": 0.5})[1].shape == (3, 1, 8, 8)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("change", "params", "sentence"),
    [
        (
            1.0,
            None,
            "images are real numbers from 0 to 255, not in [0, 1]; give them as uint8, or divide them by 255",
        ),
        (None, {"mode": "dream"}, "mode (='dream') must be one of reconstruct, encode, sample"),
        (
            None,
            {"temprature": 2.0},
            "unknown params temprature; known: mode, prior, decode, temperature, seed",
        ),
        (
            None,
            {"mode": "sample", "prior": "gmm"},
            "this model has no mixture; fit one with `vaescale fit-gmm RUN` before ",
        ),
        (
            None,
            {"mode": "sample", "temperature": 0.0},
            "prior (='standard') must be one of standard, gmm, autoregressive, and temperature (=0.0)",
        ),
        (None, {"mode": "sample", "decode": "median"}, "--decode must be one of"),
    ],
)
def test_a_request_that_cannot_be_answered_gets_a_sentence(
    ask: Callable[..., tuple[int, Any]], change: float | None, params: dict[str, Any] | None, sentence: str
) -> None:
    x = np.arange(256, dtype=np.int64).reshape(4, 1, 8, 8)
    status, message = ask((x if change is None else change * x).tolist(), params)
    assert status == 400
    assert message.startswith(sentence)
    assert "Traceback" not in message


def test_params_of_other_models_stay_as_mlflow_treats_them(ask: Callable[..., tuple[int, Any]]) -> None:
    """Nothing is raised."""
    message = "Unrecognized params ['a'] are ignored for inference. Supported params are: {'mode', 'prior'}."
    logging.getLogger(LOGGER).warning(message)


def dependencies(packages: tuple[str, ...]) -> set[str]:
    """The packages and all that they need, in pip's spelling."""
    found: set[str] = set()
    waiting = list(packages)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name not in found:
            found.add(name)
            try:
                needs = [Requirement(one) for one in importlib.metadata.requires(name) or ()]
            except importlib.metadata.PackageNotFoundError:
                continue
            waiting += [one.name for one in needs if one.marker is None or one.marker.evaluate({"extra": ""})]
    return found


ALONE = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1] + "/code")  # as MLflow does
import numpy as np, vaescale
assert Path(vaescale.__file__).is_relative_to(sys.argv[1]), vaescale.__file__
from vaescale.commands.served import _load_pyfunc
served = _load_pyfunc(sys.argv[1] + "/data/run")
images = np.zeros((2, 1, 8, 8), np.uint8)
for mode in ("reconstruct", "encode", "sample"):
    assert len(served.predict(images, {"mode": mode, "prior": sys.argv[2]})) == 2
from importlib.metadata import packages_distributions
names = packages_distributions()
print(json.dumps(sorted({one for module in sys.modules for one in names.get(module.partition(".")[0], ())})))
"""


def test_the_model_runs_on_its_own_source_and_requirements(
    vaescale, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert vaescale("fit-gmm", run, "--components", 2).code == 0
    out = tmp_path / "out"
    export(run, out)
    lines = (out / "requirements.txt").read_text().splitlines()
    assert {line.partition("==")[0] for line in lines} == {*PACKAGES, "mlflow"}
    assert all(re.fullmatch(r"[a-z]+==[0-9.]+(\.post\d+)?", line) for line in lines), lines
    command = [sys.executable, "-c", ALONE, str(out), "gmm"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    used = {re.sub(r"[-_.]+", "-", name).lower() for name in json.loads(done.stdout)}
    needed = [Requirement(one) for one in importlib.metadata.requires("vaescale") or ()]
    assert (used & {one.name for one in needed if one.marker is None}) - dependencies(PACKAGES) == set(), (
        "requirements.txt names all that is imported"
    )
    card = (out / "README.md").read_text()
    for part in (
        'mlflow.pyfunc.load_model("out")',
        "[N, 1, 8, 8]",
        "12 steps of 64 images",
        "kind: conv",
        "mlflow models serve",
    ):
        assert part in card


def test_a_kind_of_one_s_own_comes_with_the_model_and_is_imported_from_nowhere_else(
    recipe_content: dict[str, Any], recipe_file, tmp_path: Path
) -> None:
    """In processes of its own: a registration lasts as long as its process."""
    recipe = recipe_file(recipe_content | {"likelihood": {"kind": "shifted_log_normal"}})
    run, out = recipe_content["run_dir"], tmp_path / "out"
    code = f"""
import sys
sys.path.append({str(EXAMPLE)!r})
import my_likelihood, vaescale
run = vaescale.train({recipe!r}, training={{"steps": 2}})
vaescale.export(run, {str(out)!r})
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, timeout=120, check=True)
    assert (out / "code/my_likelihood.py").is_file()
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(out), "standard"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (out / "code/my_likelihood.py").rename(out / "data/my_likelihood.py")
    with pytest.raises(UserError, match="of the module my_likelihood, which is not imported"):
        _load_pyfunc(str(out / "data/run"))
    assert Path(run, "plugins.json").read_text() == (out / "data/run/plugins.json").read_text()


@pytest.mark.parametrize(
    ("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o027, 0o640, 0o750), (0o077, 0o600, 0o700)]
)
def test_files_have_the_permissions_of_the_umask(tmp_path: Path, umask: int, file: int, folder: int) -> None:
    inner = tmp_path / "out/inner"
    inner.mkdir(parents=True, mode=0o700)
    (inner / "weights").touch(mode=0o600)
    before = os.umask(umask)
    try:
        make_readable(tmp_path / "out")
    finally:
        os.umask(before)
    assert (inner / "weights").stat().st_mode & 0o777 == file
    assert inner.stat().st_mode & 0o777 == folder
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["inner"]


def test_checkpoints_and_exports_are_readable_by_others(exported: Path, trained_run: Path) -> None:
    (tmp := trained_run / "probe").touch()
    usual = tmp.stat().st_mode
    tmp.unlink()
    for folder in (exported, trained_run / "checkpoints"):
        assert {path.stat().st_mode for path in folder.rglob("*.safetensors")} == {usual}


@pytest.mark.skipif(
    "VAESCALE_SERVE" not in os.environ,
    reason="installs torch and MLflow from PyPI into an environment of the model's own, a minute or more: VAESCALE_SERVE=uv or virtualenv",
)
def test_mlflow_serves_the_model_in_its_own_environment(exported: Path, tmp_path: Path) -> None:
    """A person's `mlflow models serve`, whose environment has no vaescale."""
    command = [
        "mlflow",
        "models",
        "serve",
        "-m",
        str(exported),
        "--env-manager",
        os.environ["VAESCALE_SERVE"],
    ]
    environment = {**os.environ, "MLFLOW_ENV_ROOT": str(tmp_path / "envs")}
    server = subprocess.Popen([*command, "--port", "5078"], env=environment, start_new_session=True)
    try:
        body = json.dumps(
            {"inputs": np.zeros((2, 8, 8, 1), int).tolist(), "params": {"mode": "encode"}}
        ).encode()
        request = urllib.request.Request(
            "http://127.0.0.1:5078/invocations", body, {"Content-Type": "application/json"}
        )
        for _ in range(600):
            assert server.poll() is None, "the server has ended"
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
                    assert np.array(json.load(answer)["predictions"]).shape == (2, 4)
                    break
            except OSError:
                time.sleep(1)
        else:
            pytest.fail("no answer in ten minutes")
    finally:
        os.killpg(server.pid, 15)
        server.wait(timeout=60)
