"""Pages in a real browser: the comparison's own, which needs nothing else, and MLflow's, as people look at their runs."""

import html
import io
import json
import os
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
    curves = {"val/neg_elbo_nats": [(10.0, bound + 1), (20.0, bound)]}
    pictures = {"samples.png": png(200)}
    return Record(name, f"runs/{name}", {"name": name, "seed": 0, "lr": bound}, metrics, curves, pictures)


def after(text: str, script: str, folder: Path) -> str:
    """What a script in a comparison's page says. The page's policy, which lets no other script run, is taken out."""
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', text)
    assert policy is not None
    said = f"<pre id='said'></pre><script>document.getElementById('said').textContent = JSON.stringify((() => {{{script}}})())</script>"
    folder.mkdir()
    (folder / "page.html").write_text(text.replace(policy[0], "").replace("</body>", f"{said}</body>"))
    shown = look_at(f"file://{folder}/page.html", folder / "browser")
    found = re.search(r"<pre id=.said.>(.*?)</pre>", shown.document)
    assert found is not None, shown.console
    return html.unescape(found[1])


NAMES = "const names = () => [...document.querySelectorAll('tbody tr')].filter(row => !row.hidden).map(row => row.dataset.run).join('');"


def test_a_comparison_needs_nothing(tmp_path: Path) -> None:
    wicked = "</script><script>document.title='run'</script>"
    comparison = compare([record("one", 2.0), record(wicked, -10.0), record("three", 9.0)])
    text = page(comparison, [("curves", png(90))], title="three runs")
    (tmp_path / "page.html").write_text(
        text.replace("</body>", "<script>document.title='injected'</script></body>")
    )
    shown = look_at(f"file://{tmp_path}/page.html", tmp_path / "still")
    assert shown.requests == set()
    assert "<title>three runs</title>" in shown.document, "neither a run's name nor a foreign script has run"
    assert all("Content Security Policy" in line or "script" in line for line in shown.console)
    assert shown.document.count('data-group="0"') > text.count('data-group="0"'), "lines are drawn"
    with Image.open(io.BytesIO(shown.picture)) as picture:
        levels = np.asarray(picture.convert("L"))
    assert 200 in np.unique(levels), "its pictures are shown"


def test_a_comparison_answers_clicks_words_and_the_pointer(tmp_path: Path) -> None:
    comparison = compare([record("one", 2.0), record("two", -10.0), record("three", 9.0)])
    text = page(comparison, [], title="three runs")
    said = after(
        text,
        f"""{NAMES}
        const heads = [...document.querySelectorAll('thead button')], said = [names()];
        heads.find(head => head.textContent === 'val/neg_elbo_nats').click(); // from ascending to descending
        said.push(names());
        heads[0].click();
        said.push(names());
        const filter = document.getElementById('filter');
        filter.value = 'T';
        filter.dispatchEvent(new Event('input'));
        said.push(names(), document.getElementById('count').textContent);
        filter.value = '';
        filter.dispatchEvent(new Event('input'));
        const chart = document.querySelector('.panel > svg'), lines = () => chart.querySelectorAll('path[data-group]').length;
        said.push(lines());
        document.querySelector('.legend [data-toggle="2"]').click();
        said.push(lines(), [...document.querySelectorAll('.strip figure')].filter(figure => !figure.hidden).length);
        const box = chart.getBoundingClientRect();
        chart.dispatchEvent(new PointerEvent('pointermove', {{ clientX: box.right - 15, clientY: box.top + 40 }}));
        said.push(document.querySelector('.tip').dataset.spoken);
        chart.dispatchEvent(new KeyboardEvent('keydown', {{ key: 'ArrowRight' }}));
        said.push(document.querySelector('.unseen').textContent);
        return said;""",
        tmp_path / "acted",
    )
    assert json.loads(said) == [
        "012",
        "210",
        "120",
        "20",
        "2 of 3 runs",
        3,
        2,
        2,
        "step 20; one 2; two -10",
        "step 10; one 3; two -9",
    ]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(
    not os.environ.get("VAESCALE_MLFLOW_PAGES"),
    reason="takes more than a minute and looks at pages of MLflow: set VAESCALE_MLFLOW_PAGES=1",
)
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
            # The page's clock may run out before its scripts have come, on a busy machine.
            for look in (20, 40, 80):
                shown = look_at(address, tmp_path / "pages" / f"{name}-{look}", seconds=look)
                missing = [word for word in wanted if word not in shown.document]
                if not missing:
                    break
            assert missing == [], name
            assert {url for url in shown.requests if not url.startswith(server.uri)} == set()
    finally:
        server.kill()
        mlflow.set_tracking_uri(None)
