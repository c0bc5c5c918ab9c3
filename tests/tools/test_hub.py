"""`export --push-to-hub` against a server on this machine that answers as the Hub does for small files."""

import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from vaescale.trained import open_trained

TOKEN = "hf_notarealtoken0123456789"  # noqa: S105


class Hub(ThreadingHTTPServer):
    """The repositories that were made, and the files of the last commit."""

    refuses = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.made: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.address = f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def do_GET(self) -> None:
        self._answer({"id": "someone/digits", "sha": "0" * 40, "siblings": []})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.tokens.add(self.headers["Authorization"])
        if self.server.refuses:
            self._answer({"error": "You don't have the rights"}, 403)
        elif self.path.endswith("/repos/create"):
            self.server.made.append(json.loads(body))
            self._answer({"url": f"{self.server.address}/someone/digits", "id": "someone/digits"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            regular = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files
            ]
            self._answer({"files": regular})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            url = f"{self.server.address}/someone/digits/commit/{'1' * 40}"
            self._answer({"success": True, "commitUrl": url, "commitOid": "1" * 40})
        else:  # validation of the card's header
            self._answer({"errors": [], "warnings": []})

    def _answer(self, content: dict[str, Any], status: int = 200) -> None:
        encoded = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    pytest.importorskip("huggingface_hub", reason="needs the extra hub")
    server = Hub()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    # Read from the environment when the library is imported, which another test may have done.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("format", ["mlflow", "torch_export"])
@pytest.mark.filterwarnings("ignore")  # MLflow warns of itself
def test_an_exported_run_is_sent_with_its_card(
    vaescale: Callable[..., Any],
    run: Path,
    tmp_path: Path,
    hub: Hub,
    format: str,  # noqa: A002
) -> None:
    trained, out = open_trained(run), tmp_path / "out"
    (run / "evaluation").mkdir(exist_ok=True)
    result = {
        "weights_hash": trained.weights_hash,
        "data_hash": "d" * 64,
        "metrics": {"neg_elbo_nats": -12.25, "images": 297},
    }
    (run / "evaluation" / "val.json").write_text(json.dumps(result))
    (run / "figures" / "samples.png").write_bytes(b"\x89PNG picture")
    outcome = vaescale("export", run, out, "--format", format, "--push-to-hub", "someone/digits", "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["pushed"] == f"{hub.address}/someone/digits/commit/{'1' * 40}"
    (made,) = hub.made
    assert (made["name"], made["organization"]) == ("digits", "someone")
    assert made.get("private") is True or made.get("visibility") == "private"
    written = {
        path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()
    }
    assert hub.files == written
    card = hub.files["README.md"].decode()
    for text in (
        "| neg_elbo_nats | -12.25 |",
        "d" * 64,
        trained.weights_hash,
        trained.recipe.hash,
        "](samples.png)",
    ):
        assert text in card
    assert trained.recipe.to_yaml().strip() in card
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in outcome.err + outcome.out
    assert not any(TOKEN.encode() in content for content in written.values())


def test_numbers_of_other_weights_are_not_in_the_card(run: Path) -> None:
    from vaescale.commands.model_card import model_card

    (run / "evaluation").mkdir(exist_ok=True)
    result = {"weights_hash": "other", "metrics": {"neg_elbo_nats": -12.25}}
    (run / "evaluation" / "val.json").write_text(json.dumps(result))
    card = model_card(open_trained(run), format="onnx", repository="someone/digits")
    assert "Numbers" not in card
    assert "-12.25" not in card
    assert "Samples" not in card


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")  # of torch 2.11
def test_a_refusal_is_a_sentence_and_the_folder_stays(
    vaescale: Callable[..., Any], run: Path, tmp_path: Path, hub: Hub
) -> None:
    hub.refuses = True
    out = tmp_path / "out"
    outcome = vaescale("export", run, out, "--format", "torch_export", "--push-to-hub", "someone/digits")
    outcome.assert_refused(2, "someone/digits was not written", f"hf upload someone/digits {out}")
    assert TOKEN not in outcome.err
    assert torch.export.load(out / "decode.pt2").module()(torch.zeros(1, 4))[0].shape == (1, 1, 8, 8)


@pytest.mark.parametrize(
    "name", ["digits", "a/b/c", "some one/digits", "-x/y", f"https://user:{TOKEN}@host/x"]
)
def test_a_name_that_is_none_is_refused_first(
    vaescale: Callable[..., Any], run: Path, tmp_path: Path, name: str
) -> None:
    pytest.importorskip("huggingface_hub", reason="needs the extra hub")
    outcome = vaescale("export", run, tmp_path / "out", f"--push-to-hub={name}")
    outcome.assert_refused(2, "is no name of a repository")
    assert TOKEN not in outcome.err
    assert not (tmp_path / "out").exists()
