"""No verb is silent: within seconds it is said what was asked for, and every half minute what is done."""

import ast
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from vaescale import cli
from vaescale.system import console, heartbeat, voice
from vaescale.system.console import Progress, say
from vaescale.system.voice import Voice

COMMANDS = Path(cli.__file__).parent / "commands"
# How each verb that can take more than five seconds says what it does with what, and shows how far it is: functions that its file
# calls. `begun by`: the verb starts others, which speak for themselves.
ANNOUNCES = {
    "make-shards": {"Progress"},
    "verify-shards": {"Progress"},
    "train": {"opening", "Progress"},
    "evaluate": {"announce", "Progress"},
    "score": {"announce", "Progress"},
    "quality": {"announce", "references_of", "judge"},
    "baselines": {"announce"},
    "train-features": {"say", "Progress"},
    "encode": {"announce", "Progress"},
    "fit-gmm": {"announce", "fit_candidate"},
    "fit-prior": {"announce", "train"},
    "sample": {"announce", "Progress"},
    "latents": {"announce", "mean_gaps"},
    "average": {"announce", "Progress"},
    "compress": {"announce", "Progress"},
    "decompress": {"announce", "Progress"},
}
# The voice alone speaks for these: they have no count of what is left, or print at once what they do.
VOICE_ALONE = {"doctor", "new-recipe", "compare-runs", "export", "import", "sync", "chaos"}


def test_every_verb_is_listed() -> None:
    assert set(ANNOUNCES) | VOICE_ALONE | set(cli.SPOKEN_FOR) == set(cli.VERBS)
    assert not set(ANNOUNCES) & (VOICE_ALONE | set(cli.SPOKEN_FOR))


@pytest.mark.parametrize("verb", ANNOUNCES)
def test_a_verb_says_what_it_does_with_what(verb: str) -> None:
    tree = ast.parse((COMMANDS / f"{verb.replace('-', '_')}.py").read_text())
    called = {
        ast.unparse(node.func).rpartition(".")[2] for node in ast.walk(tree) if isinstance(node, ast.Call)
    }
    assert called >= ANNOUNCES[verb]


@pytest.fixture
def hasty(monkeypatch) -> None:
    """A voice that has no patience."""
    monkeypatch.setattr(voice, "FIRST_SECONDS", 0.1)
    monkeypatch.setattr(voice, "LOOK_EVERY_SECONDS", 0.01)
    monkeypatch.setattr(console, "LINE_EVERY_SECONDS", 0.2)


def _until(condition) -> None:
    end = time.monotonic() + 20
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)


@pytest.mark.usefixtures("hasty")
def test_any_verb_speaks_although_it_says_nothing_itself(capsys) -> None:
    said: list[str] = []

    def run(_) -> dict[str, int]:
        heartbeat.beat("counting")
        _until(lambda: said.append(capsys.readouterr().err) or "".join(said).count("\n") >= 2)
        return {}

    tool = SimpleNamespace(
        __name__="vaescale.tools.doctor", __doc__="", add_arguments=lambda _: None, run=run
    )
    assert cli.run_tool(tool, ["--json"]) == 0  # type: ignore[arg-type]
    first, second = "".join(said).splitlines()[:2]
    assert first == "vaescale doctor --json: counting"
    assert second == "vaescale doctor --json: counting, 0:00 elapsed"


@pytest.mark.usefixtures("hasty")
def test_the_voice_repeats_the_progress_in_use(capsys) -> None:
    said: list[str] = []
    with Voice("vaescale train"), Progress("train", 9, unit="steps") as progress:
        progress.update(1, "loss 3")
        progress._begun -= 60  # another text than at first
        _until(lambda: said.append(capsys.readouterr().err) or "".join(said).count("\n") >= 2)
    lines = "".join(said).splitlines()
    assert lines[0].startswith("train  1/9 steps  11%  0:00 elapsed")
    assert lines[1].startswith("train  1/9 steps  11%  1:00 elapsed")


@pytest.mark.usefixtures("hasty")
def test_the_voice_is_silent_on_other_ranks_and_after_a_word(capsys, monkeypatch) -> None:
    monkeypatch.setattr(console, "LINE_EVERY_SECONDS", 60)
    with Voice("vaescale train", shown=False):
        time.sleep(0.3)
    assert capsys.readouterr().err == ""
    with Voice("vaescale train"):
        say("a word")
        time.sleep(0.1)
    assert capsys.readouterr().err == "a word\n"
