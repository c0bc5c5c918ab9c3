"""Credentials that a person put into a recipe are found nowhere afterwards."""

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from vaescale.system.secrets import is_redacted, redact, redact_all

CASES = {
    "https://user:pass@host/x": "https://***@host/x",
    "waiting for s3://AKIA:abc/def@bucket/x (no)": "waiting for s3://***@bucket/x (no)",
    "postgresql://me:p4ss@db:5432/mlflow": "postgresql://***@db:5432/mlflow",
    "https://host/a.tar?X-Amz-Signature=abc123&x=1": "https://host/a.tar?X-Amz-Signature=***&x=1",
    "https://host/?access_token=abc, then more": "https://host/?access_token=*** then more",
    "https://token@host and https://b:c@host": "https://***@host and https://***@host",
    "postgresql://user:pa/ss@host/db": "postgresql://***@host/db",
    "https://user:p@ss@host/x, https://host/y": "https://***@host/x, https://host/y",
    "mssql+pyodbc:///?odbc_connect=DRIVER%3DX%3BUID%3Dme%3BPWD%3Dhunter2%3BY%3D1": (
        "mssql+pyodbc:///?odbc_connect=DRIVER%3DX%3BUID%3Dme%3BPWD%3D***%3BY%3D1"
    ),
    "https://h/?pwd=a&pass=b&auth=c&code=d#access_token=e": (
        "https://h/?pwd=***&pass=***&auth=***&code=***#access_token=***"
    ),
    "mail me@host.org, see https://host/me": "mail me@host.org, see https://host/me",
    "sqlite:///runs/mlflow.db": "sqlite:///runs/mlflow.db",
    "sqlite:////home/me@here/mlflow.db": "sqlite:////home/me@here/mlflow.db",
}


@pytest.mark.parametrize("text", CASES)
def test_what_is_cut_out(text: str) -> None:
    assert redact(text) == CASES[text]
    assert redact(redact(text)) == redact(text)
    assert is_redacted(redact(text)) == (redact(text) != text)


def test_nested_values() -> None:
    value = {"a": ["https://u:p@h", 1, None], "b": {"c": "x"}}
    assert redact_all(value) == {"a": ["https://***@h", 1, None], "b": {"c": "x"}}


@pytest.fixture
def server(digits: Path) -> Iterator[str]:
    """The digits behind a web server on this machine, as `localhost:PORT`."""
    handler = functools.partial(Quiet, directory=str(digits))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"localhost:{server.server_address[1]}"
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_planted_secret_is_found_nowhere(
    vaescale, recipe_file, recipe_content, server, tmp_path, monkeypatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run = Path(recipe_content["run_dir"])
    recipe_content["data"] |= {
        "train": f"http://reader:hunter2@{server}/train",
        "val": f"http://reader:hunter2@{server}/val",
        "cache": "none",
        "cache_dir": str(tmp_path / "cache"),
    }
    recipe_content["tracking"] = {"mlflow": "http://writer:hunter2@127.0.0.1:9", "experiment": "tests"}
    path = recipe_file(recipe_content)
    dry = vaescale("train", path, "--dry-run", "--json")
    assert dry.code == 0, dry.err
    outcome = vaescale("train", path)
    assert outcome.code == 0, outcome.err
    again = vaescale("train", path, "training.steps=13")
    assert again.code == 2
    assert "is behind" in outcome.err
    words = "".join(word for one in (dry, outcome, again) for word in (one.out, one.err))
    assert "hunter2" not in words
    files = [file for folder in (run, tmp_path / "cache") for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 8
    assert not [file for file in files if b"hunter2" in file.read_bytes()]
    vaescale("evaluate", run).assert_refused(3, "had credentials, which run folders do not keep")
    vaescale("sync", run).assert_refused(2, "had credentials", "MLFLOW_TRACKING_USERNAME")
