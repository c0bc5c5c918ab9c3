"""`vaescale compress` and `decompress`: images come back equal with keys and labels, and strangers' files do no harm."""

import csv
import itertools
import json
import math
import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import run_verb, tiny_recipe
from tests.ranks import on_ranks
from vaescale.commands.compress import compress
from vaescale.commands.decompress import _join_tables, decompress, file_name
from vaescale.commands.evaluate import evaluate
from vaescale.compression import container, determinism
from vaescale.compression.container import CRC, LENGTHS, MAGIC, Reader, pack_header
from vaescale.data.batch import Request
from vaescale.errors import DataError, UserError
from vaescale.mixtures import files as mixture_files
from vaescale.mixtures.gaussian import Mixture
from vaescale.trained import open_split, open_trained

pytest.importorskip("constriction")
LIMIT = 150


def train(folder: Path, digits: Path, likelihood: dict[str, Any], **sections: Any) -> Path:
    content = tiny_recipe(digits, folder / "run") | {"likelihood": likelihood, **sections}
    content["training"] |= {"steps": 4, "evaluate_every": 4, "checkpoint_every": 4}
    (folder / "recipe.yaml").write_text(json.dumps(content))
    assert run_verb("train", folder / "recipe.yaml") == 0
    return folder / "run"


@pytest.fixture(scope="module")
def grey_run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    likelihood = {"kind": "discretized_logistic_mixture", "components": 2}
    return train(tmp_path_factory.mktemp("grey"), digits, likelihood)


@pytest.fixture(scope="module")
def binary_run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ladder with the class as its condition."""
    ladder = {
        "network": {"kind": "ladder", "latent_dim": 2, "width": 8},
        "condition": {"classes": 10, "width": 8},
    }
    return train(tmp_path_factory.mktemp("binary"), digits, {"kind": "bernoulli"}, **ladder)


@pytest.fixture(scope="module")
def made(
    grey_run: Path, digits: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """A file of 150 digits in three chunks, and what `compress` returned. Read only."""
    out = tmp_path_factory.mktemp("made") / "deep" / "digits.vsz"
    return out, compress(grey_run, str(digits), out, split="val", limit=LIMIT, chunk_images=60, check=True)


def originals(run: Path) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    reader = open_split(open_trained(run).recipe, "val")
    fetched = reader.__getitems__(Request(np.arange(LIMIT), refill=False))
    return fetched.images.numpy(), fetched.labels.numpy(), fetched.keys


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "labels.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_image_comes_back_with_its_key_and_label(made, grey_run: Path, tmp_path: Path) -> None:
    file, result = made
    back = decompress(file, tmp_path / "out", run=grey_run)
    assert (back["images"], back["chunks"], back["damaged"], back["is_whole"]) == (LIMIT, 3, {}, True)
    images, labels, keys = originals(grey_run)
    rows = rows_of(tmp_path / "out")
    assert [row["key"] for row in rows] == list(keys)
    assert [int(row["label"]) for row in rows] == labels.tolist()
    assert [int(row["number"]) for row in rows] == list(range(LIMIT))
    for row, image in zip(rows, images, strict=True):
        assert row["file"].startswith(f"val/{row['class']}/")
        assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / row["file"])), image[0])
    assert not list((tmp_path / "out").glob("labels.*.csv"))
    sizes = result["bytes_of"]
    assert result["bytes"] == file.stat().st_size == sum(sizes.values()) - sizes["initial_bits"]
    assert [path.name for path in file.parent.iterdir()] == ["digits.vsz"], "nothing temporary is left"
    net = 8 * (sizes["code"] - sizes["initial_bits"]) / (LIMIT * 64)
    assert result["bits_per_dim"]["net_code"] == pytest.approx(net, rel=2e-3)


def test_evaluate_measures_the_length_of_the_code(made, grey_run: Path) -> None:
    metrics = evaluate(grey_run, code_length=True, images=LIMIT)
    length = metrics["metrics"]["code_length_nats"]
    assert length == pytest.approx(metrics["metrics"]["neg_elbo_nats"], rel=0.01)
    assert made[1]["net_code_nats"] == pytest.approx(length, rel=0.01)
    assert "code_length_nats" in metrics["protocol"]
    assert not any("code_length" in name for name in metrics["more_is_better"])


def test_a_chunk_alone_and_a_damaged_chunk(vaescale, made, grey_run: Path, tmp_path: Path) -> None:
    file = tmp_path / "damaged.vsz"
    content = bytearray(made[0].read_bytes())
    with Reader(made[0]) as reader:
        content[reader.records[1].offset + 200] ^= 1
    file.write_bytes(content)
    outcome = vaescale("decompress", file, tmp_path / "rest", "--run", grey_run)
    assert outcome.code == 3
    assert "chunk 1 of" in outcome.err
    assert "left out: its checksum differs" in outcome.out
    assert [int(row["number"]) for row in rows_of(tmp_path / "rest")] == [*range(60), *range(120, LIMIT)]
    alone = decompress(made[0], tmp_path / "alone", run=grey_run, chunks=[2])
    assert alone["images"] == LIMIT - 120
    with pytest.raises(UserError, match=r"--chunk \(=3\) is not in"):
        decompress(made[0], tmp_path / "none", run=grey_run, chunks=[3])


def rewritten(source: Path, path: Path, *, header: dict[str, Any] | None = None, chunk: Any = None) -> Path:
    """A file with another header or first chunk, whose checksums are right, and without a table."""
    with Reader(source) as reader:
        begin = pack_header({**reader.header, **(header or {})})
        first = reader._at(reader.records[0].offset, reader.records[0].bytes)
    if chunk is not None:
        _, *lengths = LENGTHS.unpack_from(first)
        ends = np.cumsum([LENGTHS.size, *lengths])
        parts = chunk([first[start:end] for start, end in itertools.pairwise(ends)])
        first = b"".join([LENGTHS.pack(b"VSZC", *map(len, parts)), *parts])
        first += CRC.pack(zlib.crc32(first))
    path.write_bytes(begin + first)
    return path


def test_names_of_a_stranger_stay_inside_the_folder(made, grey_run: Path, tmp_path: Path) -> None:
    def wicked(parts: list[bytes]) -> list[bytes]:
        names = json.loads(zlib.decompress(parts[1]))
        keys = [
            "../../up",
            "/etc/passwd",
            "..",
            "",
            "a\0b",
            "x" * 5000,
            "=cmd()",
            "same",
            "same",
            "\ud800.png",
        ]
        names |= {"split": "../..", "keys": keys * 6}
        return [parts[0], zlib.compress(json.dumps(names).encode()), *parts[2:]]

    header = {"class_names": {"../..": [f"../class{n}" for n in range(10)]}}
    file = rewritten(made[0], tmp_path / "wicked.vsz", header=header, chunk=wicked)
    before = set(tmp_path.rglob("*"))
    result = decompress(file, tmp_path / "a" / "out", run=grey_run)
    assert (result["images"], result["is_whole"]) == (60, False)
    written = set(tmp_path.rglob("*.png")) - before
    assert len(written) == 60
    assert all(path.resolve().is_relative_to((tmp_path / "a" / "out").resolve()) for path in written)
    assert rows_of(tmp_path / "a" / "out")[0]["key"] == "../../up"
    assert [file_name(text) for text in ("..", "a/../b", "", ".x", "é")] == ["_", "a_.._b", "_", "x", "_"]


def test_a_missing_table_of_labels_is_named(tmp_path: Path) -> None:
    (tmp_path / "vectors.0.csv").write_text("a.png,1\n")
    with pytest.raises(DataError, match=r"labels.0.csv cannot be read .No such file"):
        _join_tables(tmp_path)
    (tmp_path / "labels.0.csv").write_text("a.png,a,3,3,val,0\n")
    _join_tables(tmp_path)
    assert rows_of(tmp_path)[0]["key"] == "a"


def test_words_that_decode_to_other_images_are_noticed(made, grey_run: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for number, words in enumerate((generator.bytes(4000), b"", generator.bytes(400) + b"\0\0\0\0")):
        file = rewritten(
            made[0], tmp_path / f"{number}.vsz", chunk=lambda parts, words=words: [*parts[:3], words]
        )
        result = decompress(file, tmp_path / str(number), run=grey_run)
        assert result["images"] == 0
        assert list(result["damaged"]) == ["0"], "named, and nothing written"
        assert not list((tmp_path / str(number)).rglob("*.png"))


@pytest.mark.parametrize(
    ("header", "fault"),
    [
        ({"weights_hash": "0" * 64}, "has other weights"),
        ({"latent_bits": 400}, "latent_bits 400"),
        ({"latent_bits": 8}, "codes the file's test pattern in other bits|away from the machine"),
        ({"image_shape": [3, 1 << 20, 1 << 20]}, "of other images"),
        ({"image_shape": 3}, "invalid"),
        ({"image_shape": [1, 8, math.inf]}, "invalid"),
        ({"step": math.inf}, "invalid"),
        ({"pattern": {"outputs": "AAAA", "words": ""}}, "test pattern is damaged"),
        ({"class_names": None}, "invalid"),
        ({"step": 99}, "no sound checkpoint of step 99"),
        ({"weights": "../x"}, "must be 'ema'"),
        ({"mixture": {"sha256": "../../x"}}, "no sha256"),
        ({"mixture": {"sha256": "0" * 64}}, "has no mixture with the sha256"),
        ({"mixture": None}, "invalid"),
    ],
)
def test_headers_that_do_not_fit_are_refused_before_anything_is_written(
    made,
    grey_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    header: dict[str, Any],
    fault: str,
) -> None:
    monkeypatch.setattr(container, "strict_json", json.dumps)  # with Infinity
    file = rewritten(made[0], tmp_path / "file.vsz", header=header)
    with pytest.raises(UserError, match=fault):
        decompress(file, tmp_path / "out", run=grey_run)
    assert not (tmp_path / "out").exists()


def test_a_run_elsewhere_is_not_opened_by_its_name_in_a_file(made, tmp_path: Path) -> None:
    for run, fault in (
        ("/runs/x", "give it: --run RUN"),
        ("../x", "give it: --run RUN"),
        ("a\0b", "is not a run folder"),
        ("\ud800", "is not a run folder"),
    ):
        file = rewritten(made[0], tmp_path / "file.vsz", header={"run": run})
        with pytest.raises(UserError, match=fault):
            decompress(file, tmp_path / "out")


def test_a_machine_that_computes_otherwise_is_refused(
    made, grey_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = determinism.fingerprint

    def other(shift: float, words: str):
        def fingerprint(codec):
            mark = mine(codec)
            outputs = mark.numbers + shift
            encoded = determinism.base64.b64encode(outputs.astype("<f8").tobytes()).decode()
            return determinism.Fingerprint(encoded, words or mark.words)

        return fingerprint

    for shift, words, fault in ((3e-9, "", "3.0e-09 away from the machine"), (0.0, "ab", "in other bits")):
        monkeypatch.setattr(determinism, "fingerprint", other(shift, words))
        with pytest.raises(UserError, match=fault):
            decompress(made[0], tmp_path / "out", run=grey_run)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(determinism, "fingerprint", other(1e-13, ""))
    assert decompress(made[0], tmp_path / "out", run=grey_run, chunks=[2])["images"] == LIMIT - 120


@pytest.mark.parametrize("threads", [1, 2])
def test_other_kernels_decode_alike(made, grey_run: Path, tmp_path: Path, threads: int) -> None:
    """Outputs that differ by a thousand times the rounding error of float64 decode to the same images."""
    from vaescale.compression.bits_back import Codec

    torch.set_num_threads(threads)
    original = Codec._numbers
    generator = np.random.default_rng(0)

    def disturbed(self, tensor, number):
        outputs = original(self, tensor, number)
        return outputs + generator.uniform(-1e-12, 1e-12, outputs.shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Codec, "_numbers", disturbed)
        assert decompress(made[0], tmp_path / "out", run=grey_run)["damaged"] == {}


def other_mixture(run: Path, seed: int) -> Mixture:
    """A mixture with full covariances in the place of one that fit-gmm fits to the run's latents."""
    trained = open_trained(run)
    generator = torch.Generator().manual_seed(seed)
    size = trained.model.latent_dim
    means = torch.randn(5, size, generator=generator, dtype=torch.float64)
    factors = torch.eye(size) + 0.2 * torch.randn(5, size, size, generator=generator, dtype=torch.float64)
    mixture = Mixture(torch.full((5,), 0.2, dtype=torch.float64), means, factors @ factors.mT)
    mixture_files.save(mixture, run / "gmm", trained.identity)
    return mixture


def test_a_mixture_is_the_prior_and_no_other_one_decodes(
    vaescale, grey_run: Path, digits: Path, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "m.vsz"
    shutil.copytree(grey_run, run)
    words = ("compress", run, digits / "val", out, "--prior", "gmm", "--limit", 70)
    vaescale(*words).assert_refused(2, "holds no fitted mixture; fit one")
    mixture = other_mixture(run, 0)
    result = compress(run, str(digits / "val"), out, limit=70, prior="gmm", check=True)
    assert result["prior"] == "mixture of 5"
    measured = evaluate(run, code_length=True, prior="gmm", images=70)
    assert result["net_code_nats"] == pytest.approx(measured["metrics"]["code_length_gmm_nats"], rel=0.01)
    assert "the mixture of 5" in measured["protocol"]["code_length_gmm_nats"]
    with Reader(out) as reader:
        assert reader.header["mixture"]["sha256"] == mixture_files.sha256(mixture)
        assert reader.header["version"] == out.read_bytes()[len(MAGIC)] == 2

    other_mixture(run, 1)
    assert decompress(out, tmp_path / "kept", run=run)["damaged"] == {}, "the run keeps the mixture"
    images, _, _ = originals(run)
    for row, image in zip(rows_of(tmp_path / "kept"), images, strict=False):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "kept" / row["file"])), image[0])
    shutil.rmtree(run / "compression")
    vaescale("decompress", out, tmp_path / "no", "--run", run).assert_refused(
        2, "has no mixture with the sha256"
    )
    (run / "gmm" / "mixture.safetensors").write_bytes(b"x")
    refused = vaescale("decompress", out, tmp_path / "no", "--run", run)
    refused.assert_refused(2, "has no mixture with the sha256")
    assert "gmm is passed over: the mixture in" in refused.err
    mixture_files.save(mixture, run / "gmm" / "components-5", {})
    assert decompress(out, tmp_path / "compared", run=run)["images"] == 70
    assert not (tmp_path / "no").exists()


def test_black_and_white_images(binary_run: Path, digits: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has grey values"):
        compress(binary_run, str(digits / "val"), tmp_path / "grey.vsz", limit=30)
    assert not list(tmp_path.iterdir())
    result = compress(
        binary_run, str(digits / "val"), tmp_path / "b.vsz", limit=30, binarize=True, check_each=True
    )
    assert result["bytes_of"]["checks"] == 4 * 30
    decompress(tmp_path / "b.vsz", tmp_path / "b", run=binary_run)
    levels = {
        int(v) for row in rows_of(tmp_path / "b") for v in np.unique(Image.open(tmp_path / "b" / row["file"]))
    }
    assert levels == {0, 255}
    again = compress(binary_run, f"folder:{tmp_path / 'b'}", tmp_path / "again.vsz")
    assert again["images"] == 30, "what is black and white needs no --binarize"


def both_ways(rank: int, ranks: int, run: str, source: str, folder: str) -> list[int]:
    out = Path(folder) / "two.vsz"
    coded = compress(Path(run), source, out, limit=LIMIT, chunk_images=40, prior="gmm")
    back = decompress(out, Path(folder) / "two", run=Path(run))
    return [coded["images"], coded["chunks"], back["images"], len(back["damaged"])]


@pytest.mark.distributed
def test_two_processes_share_the_images(grey_run: Path, digits: Path, tmp_path: Path) -> None:
    run = shutil.copytree(grey_run, tmp_path / "run")
    other_mixture(run, 2)
    arguments = (str(run), str(digits / "val"), str(tmp_path))
    assert on_ranks(tmp_path / "ranks", both_ways, *arguments) == [[LIMIT, 4, LIMIT, 0]] * 2
    images, _, keys = originals(grey_run)
    rows = {int(row["number"]): row for row in rows_of(tmp_path / "two")}
    assert [rows[number]["key"] for number in range(LIMIT)] == list(keys)
    for number, image in enumerate(images):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "two" / rows[number]["file"])), image[0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ranks", "run", "two", "two.vsz"]


def test_refusals(vaescale, made, grey_run: Path, trained_run: Path, digits: Path, tmp_path: Path) -> None:
    words = ("compress", grey_run, digits / "val", tmp_path / "x.vsz")
    vaescale(*words, "--binarize", "--limit", 3).assert_refused(
        2, "is for runs with likelihood.kind bernoulli"
    )
    vaescale(*words, "--chunk-images", 2_000_000).assert_refused(2, "give at most 1048576")
    vaescale(*words[:3], made[0]).assert_refused(2, "exists; delete it")
    vaescale("compress", trained_run, *words[2:]).assert_refused(2, "has no lossless code")
    vaescale("evaluate", trained_run, "--code-length").assert_refused(2, "is a density")
    vaescale("evaluate", grey_run, "--prior", "gmm").assert_refused(2, "--code-length measures; give both")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    vaescale("decompress", made[0], tmp_path / "full", "--run", grey_run).assert_refused(2, "is not empty")
    (tmp_path / "other.vsz").write_bytes(MAGIC[:4])
    vaescale("decompress", tmp_path / "other.vsz", tmp_path / "o").assert_refused(3, "is no .vsz file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "other.vsz"]
