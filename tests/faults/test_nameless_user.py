"""A user without a name, a home folder and git trains, judges and exports, with data behind http and tracking by MLflow."""

import functools
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

from tests.conftest import tiny_recipe
from tests.nameless import UID, run_nameless
from vaescale.runs.folder import read_json

pytestmark = pytest.mark.distributed
CODE = """
import sys
from vaescale.cli import main
sys.exit(max(main(words.split(" ")) for words in sys.argv[1:]))
"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Write nothing."""


@pytest.fixture
def served(digits: Path) -> Iterator[str]:
    """The address of the digits' shards on a server of this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(digits))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_everything_works_without_a_name_and_a_home(
    digits: Path, served: str, empty_store: Path, tmp_path: Path
) -> None:
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    content = tiny_recipe(digits, tmp_path / "run")
    content["data"] |= {"train": f"{served}/train", "val": f"{served}/val"}
    content["training"] |= {"steps": 2, "evaluate_every": 2, "checkpoint_every": 2}
    content["tracking"] = {"mlflow": f"sqlite:///{tmp_path}/mlflow.db", "experiment": "tests"}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "tmp").mkdir()
    verbs = ("train recipe.yaml", "quality run --features pixels --count 50", "export run exported")
    done = run_nameless(CODE, tmp_path, *verbs, TMPDIR=str(tmp_path / "tmp"))
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "tmp" / f"vaescale-{UID}"
    assert done.stderr.count(f"this user has no home folder: caches are kept in {folder}") == 1
    assert list((folder / ".cache/vaescale/shards").iterdir())
    assert list((folder / ".cache/vaescale/references").iterdir())
    assert read_json(tmp_path / "run/run.json")["git_revision"] == "none"
    state = json.loads((tmp_path / "run/mlflow.json").read_text())
    assert state["sent_bytes"] == (tmp_path / "run/metrics.jsonl").stat().st_size
    assert (tmp_path / "exported/MLmodel").is_file()
    assert not (tmp_path / "~").exists()
