"""Pages in a real browser: the comparison's own, which needs nothing else, and MLflow's, as people look at their runs."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.browser import look_at, needs_browser
from tests.mlflow_server import Server
from vaescale.commands.compare_runs import page
from vaescale.runs.comparison import Record, compare

pytestmark = needs_browser


def png(level: int) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.full((40, 40), level, np.uint8)).save(content, format="png")
    return content.getvalue()


def record(name: str, bound: float) -> Record:
    metrics = {"val/neg_elbo_nats": bound, "val/mse": 0.1}
    return Record(name, f"runs/{name}", {"name": name, "seed": bound}, metrics, {}, {"samples.png": png(200)})


def first_column(document: str) -> list[str]:
    return re.findall(r"<tr><td>(\w+)</td>", document)


def test_a_comparison_needs_nothing_and_sorts_at_a_click(tmp_path: Path) -> None:
    comparison = compare([record("one", 2.0), record("two", -10.0), record("three", 9.0)])
    text = page(comparison, [("curves", png(90))], title="three runs")
    (tmp_path / "page.html").write_text(text)
    shown = look_at(f"file://{tmp_path}/page.html", tmp_path / "still")
    assert (shown.console, shown.requests) == ([], set())
    assert first_column(shown.document) == ["two", "one", "three"]
    with Image.open(io.BytesIO(shown.picture)) as picture:
        levels = np.asarray(picture.convert("L"))
    assert {90, 200} <= set(np.unique(levels).tolist()), "its pictures are shown"
    head = re.findall(r"<th>([^<]*)</th>", text)
    click = f"<script>document.querySelectorAll('th')[{head.index('val/neg_elbo_nats')}].click()</script>"
    for clicks, order in ((1, ["two", "one", "three"]), (2, ["three", "one", "two"])):
        (tmp_path / "clicked.html").write_text(text.replace("</body>", clicks * click + "</body>"))
        clicked = look_at(f"file://{tmp_path}/clicked.html", tmp_path / str(clicks))
        assert first_column(clicked.document) == order, "as numbers, not as words"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore")  # MLflow warns of itself
def test_mlflow_shows_runs_that_a_server_was_told_of(
    vaescale, recipe_file, recipe_content, tmp_path: Path, monkeypatch
) -> None:
    """A remote server works like a store of one's own: a sweep below one run, pictures, a model, a comparison; and its pages show them."""
    import mlflow

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    server = Server(tmp_path)
    content = {
        **recipe_content,
        "run_dir": "runs/${name}",
        "tracking": {"mlflow": server.uri, "experiment": "pages"},
    }
    try:
        server.start()
        sweep = vaescale("sweep", recipe_file(content), "likelihood.sigma=optimal,0.5,0.1", "--json")
        assert sweep.code == 0, sweep.err
        run = tmp_path / "runs" / "tiny-sigma-optimal"
        assert vaescale("sample", run, "--count", 16).code == 0
        logged = vaescale("export", run, tmp_path / "exported", "--log", "--json")
        assert logged.code == 0, logged.err
        model = mlflow.pyfunc.load_model(logged.json["model_uri"])
        assert model.predict(np.zeros((2, 1, 8, 8), np.uint8)).shape == (2, 1, 8, 8)
        words = ("compare-runs", "--experiment", "pages", "--store", server.uri, "--out", tmp_path / "out")
        compared = vaescale(*words, "--json")
        assert compared.code == 0, compared.err
        assert len(compared.json["runs"]) == 3
        assert "samples" in (tmp_path / "out" / "comparison.html").read_text()
        states = [
            json.loads((tmp_path / "runs" / one["name"] / "mlflow.json").read_text())
            for one in sweep.json["variants"]
        ]
        here = f"{server.uri}/#/experiments/{states[0]['experiment_id']}"
        ids = json.dumps([state["run_id"] for state in states])
        for name, address, wanted in (
            ("run", f"{here}/runs/{states[0]['run_id']}", ["tiny-sigma-optimal", "val/neg_elbo_nats"]),
            ("metrics", f"{here}/runs/{states[0]['run_id']}/model-metrics", ["bits_per_dim", "kl_nats"]),
            (
                "artifacts",
                f"{here}/runs/{states[0]['run_id']}/artifacts/figures/samples.png",
                ["recipe.yaml", "samples.png"],
            ),
            (
                "comparison",
                f"{server.uri}/#/compare-runs?runs={ids}&experiments=[%22{states[0]['experiment_id']}%22]",
                ["tiny-sigma-optimal", "tiny-sigma-0.5", "tiny-sigma-0.1", "likelihood.sigma"],
            ),
        ):
            shown = look_at(address, tmp_path / "pages" / name, seconds=20)
            for word in wanted:
                assert word in shown.document, f"{name}: {word}"
            assert {url for url in shown.requests if not url.startswith(server.uri)} == set()
    finally:
        server.kill()
        mlflow.set_tracking_uri(None)
