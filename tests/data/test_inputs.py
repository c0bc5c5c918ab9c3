"""What people bring, one row each: how it is given to the command line, and what is said or refused.

`python -m tests.data.test_inputs` runs the rows and prints the table.
"""

import gzip
import io
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

Files = dict[str, bytes]
STACK = np.arange(48, dtype=np.uint8).reshape(3, 4, 4)
XMP = b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'


class Row(NamedTuple):
    """An input. words: what follows `vaescale make-shards`, where IN is the input; said: words of the output, in any order."""

    name: str
    files: Callable[[], Files] | Callable[[Path], None]
    words: str
    code: int
    said: tuple[str, ...]


def saved(
    kind: str = "PNG", size: tuple[int, int] = (4, 4), mode: str = "RGB", value: int = 0, **options: object
) -> bytes:
    buffer = io.BytesIO()
    fill = (value, 99, 40, 100)[: len(mode)] if len(mode) > 1 else value
    Image.new(mode, size, fill).save(buffer, kind, **options)
    return buffer.getvalue()


def turned(kind: str) -> bytes:
    tags = Image.Exif()
    tags[274] = 6
    return saved(kind, (32, 24), exif=tags if kind == "TIFF" else tags.tobytes())


def array(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def images(*folders: str, each: int = 2, content: bytes | None = None, ending: str = "png") -> Files:
    return {f"{folder}/{n}.{ending}": content or saved(value=n) for folder in folders for n in range(each)}


def stack(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, x=STACK, **arrays)
    return buffer.getvalue()


def empty_val(folder: Path) -> None:
    (folder / "val").mkdir(parents=True)
    for name, content in images("train/ant", "train/bee").items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def tar(files: Files, *, link: str = "") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        if link:
            info = tarfile.TarInfo(link)
            info.type, info.linkname = tarfile.LNKTYPE, next(iter(files))
            archive.addfile(info)
    return buffer.getvalue()


def packed(files: Files) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def samples(**members: bytes | Callable[[int], bytes]) -> Files:
    """Members of three samples; in a name, `_` is a dot."""
    return {
        f"{key:03d}.{name.replace('_', '.')}": content(key) if callable(content) else content
        for key in range(3)
        for name, content in members.items()
    }


def idx(values: np.ndarray) -> bytes:
    head = bytes((0, 0, 8, values.ndim)) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    return gzip.compress(head + values.astype(np.uint8).tobytes())


def emnist(prefix: str, labels: list[int]) -> Files:
    return {
        f"emnist-letters-{prefix}-images-idx3-ubyte.gz": idx(np.zeros((len(labels), 4, 4))),
        f"emnist-letters-{prefix}-labels-idx1-ubyte.gz": idx(np.array(labels)),
    }


def parquet(folder: Path, *, other: bool = False, label: list[int] | list[str] | None = None) -> None:
    """A Parquet file with images, a column of labels, and perhaps another one of images."""
    import datasets
    import pyarrow.parquet

    rows: dict[str, list] = {"img": [{"bytes": saved(value=place), "path": None} for place in range(3)]}
    features = {"img": datasets.Image()}
    if other:
        rows["other"], features["other"] = rows["img"], datasets.Image()
    if label is not None:
        rows["label"] = label
        features["label"] = datasets.Value("int64" if isinstance(label[0], int) else "string")
    data = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    (folder / "data").mkdir(parents=True)
    pyarrow.parquet.write_table(data.data.table, folder / "data" / "train-00000-of-00001.parquet")


def lsun(folder: Path, *, number: int = 1) -> None:
    lmdb = pytest.importorskip("lmdb")
    for split in ("train", "val"):
        place = folder / f"church_outdoor_{split}_lmdb"
        place.mkdir(parents=True)
        with (
            lmdb.open(str(place), map_size=1 << 20) as environment,
            environment.begin(write=True) as transaction,
        ):
            for key in range(number):
                transaction.put(bytes((255, key)), saved("WEBP"))


def heic(folder: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    folder.mkdir()
    heif.from_pillow(Image.new("RGB", (16, 16))).save(folder / "1.heic")


def jxl(folder: Path) -> None:
    pytest.importorskip("pillow_jxl")
    folder.mkdir()
    Image.new("RGB", (16, 16)).save(folder / "1.jxl", "JXL")


TINY = {
    **{f"train/{wnid}/images/{wnid}_0.JPEG": saved("JPEG") for wnid in ("n01443537", "n01629819")},
    "val/images/val_0.JPEG": saved("JPEG"),
    "val/val_annotations.txt": b"val_0.JPEG\tn01629819\t0\t0\t9\t9\n",
}
FACES = {f"{number:06d}.jpg": saved("JPEG", (178, 218)) for number in range(3)}
PARTITION = b"000000.jpg 0\n000001.jpg 1\n000002.jpg 2\n"
CELEBA = {**{f"Img/img_align_celeba/{name}": content for name, content in FACES.items()}, "Eval/list_eval_partition.txt": PARTITION}  # fmt: skip
OMNIGLOT = {
    f"images_background/{alphabet}/character01/1.png": saved(mode="1", value=place)
    for place, alphabet in enumerate(("Greek", "Latin"))
} | {"images_evaluation/Tengwar/character01/1.png": saved(mode="1", value=1)}
HALF = {f"{number}.jpg": turned("JPEG") if number % 2 else saved("JPEG", (32, 24)) for number in range(4)}
TWO_IMAGES = samples(input_jpg=saved("JPEG"), target_jpg=saved("JPEG"))
IMG2DATASET = samples(jpg=saved("JPEG"), json=b'{"caption": "a"}', txt=b"a")
PAGES = saved("TIFF", save_all=True, append_images=[Image.new("RGB", (4, 4))] * 2)
EACH = "--holdout 0"
# The name of the input; its files or a function; the words; the exit code; what is said.
ROWS = [
    Row("JPEGs with EXIF orientation 6", lambda: HALF, f"folder:IN OUT {EACH} --size 8", 0, ("2 of 4 images were turned upright",)),
    Row("the same, files kept", lambda: HALF, f"folder:IN OUT {EACH}", 0, ("2 of 4 images have an EXIF orientation", "of several shapes")),
    Row("the same in a tar", lambda: {"a.tar": tar(HALF)}, "--index-only IN", 0, ("2 of 4 images have an EXIF orientation",)),
    Row("PNG, WebP and TIFF with the tag", lambda: {f"{kind}.{kind.lower()}": turned(kind) for kind in ("PNG", "WEBP", "TIFF")}, f"folder:IN OUT {EACH} --size 8", 0, ("3 of 3 images were turned upright",)),
    Row("an orientation in XMP alone", lambda: {"a.jpg": saved("JPEG", (32, 24), xmp=XMP)}, f"folder:IN OUT {EACH}", 0, ("1 of 1 images have an orientation in XMP alone", "24x32x3")),
    Row("train ant, bee, cat; val ant, cat", lambda: images("train/ant", "train/bee", "train/cat", "val/ant", "val/cat"), "folder:IN OUT", 0, ("val has no image of 1 of 3 classes (bee)", "ant 2, bee 0, cat 2")),
    Row("EMNIST letters, 1 to 3", lambda: emnist("train", [1, 2, 3]) | emnist("test", [1, 2]), "idx:IN OUT", 0, ("1 1, 2 1, 3 1", "test has no image of 1 of 3 classes (3)", "turned upright")),
    Row("Train/, Test/", lambda: images("Train/a", "Train/b", "Test/a", "Test/b"), "folder:IN OUT", 0, ("OUT/train: 4 images", "OUT/test: 4 images", "nothing is held out")),
    Row("bus/, car/, test/", lambda: images("bus", "car", "test"), "folder:IN OUT", 3, ("and also bus, car", "--splits test=test,train=DIR", "--classes-only")),
    Row("the same, --classes-only", lambda: images("bus", "car", "test"), f"folder:IN OUT --classes-only {EACH}", 0, ("bus 2, car 2, test 2",)),
    Row("the same, --splits", lambda: images("bus", "car", "test"), "folder:IN OUT --splits test=test,train=.", 0, ("OUT/train: 4 images", "OUT/test: 2 images")),
    Row("Parquet, int64 labels", lambda folder: parquet(folder, label=[0, 3, 3]), f"hf:IN OUT {EACH}", 0, ("OUT/train: 3 images",)),
    Row("Parquet, string labels", lambda folder: parquet(folder, label=["dog", "ant", "dog"]), f"hf:IN OUT {EACH}", 0, ("ant 1, dog 2",)),
    Row("several image columns", lambda folder: parquet(folder, other=True), f"hf:IN OUT {EACH}", 0, ("other", "--column")),
    Row("metadata.jsonl beside pictures", lambda: {**images("train"), "train/metadata.jsonl": b'{"file_name": "0.png", "label": "cat"}\n{"file_name": "1.png", "label": "dog"}'}, f"hf:IN OUT {EACH}", 0, ("cat 1, dog 1",)),
    Row('tars with .json {"label": 3}', lambda: {"a.tar": tar(samples(png=saved(), json=b'{"label": 3}'))}, "--index-only IN", 0, ("classes are the numbers in json:label", "0-2")),
    Row("tars with words in .cls", lambda: {"a.tar": tar(samples(png=saved(), cls=lambda key: (b"dog", b"ant")[key % 2]))}, "--index-only IN", 0, ("ant, dog", "2 classes")),
    Row("class folders in tars", lambda: {"a.tar": tar(images("ant", "bee"))}, "--index-only IN", 0, ("2 words in folder", "2 classes")),
    Row("tars with .txt captions", lambda: {"a.tar": tar(samples(png=saved(), txt=b"a"))}, "--index-only IN", 0, ("members left out: txt (3, captions)",)),
    Row("hf: on tars", lambda: {"train-0.tar": tar(samples(png=saved(), cls=lambda key: b"%d" % key))}, f"hf:IN OUT {EACH}", 0, ("3 classes",)),
    Row("Tiny ImageNet", lambda: TINY, "imagenet:IN OUT", 0, ("n01443537 0, n01629819 1",)),
    Row("Tiny ImageNet without val", lambda: {name: content for name, content in TINY.items() if "train" in name}, f"folder:IN OUT {EACH}", 0, ("n01443537 1, n01629819 1",)),
    Row("tiny-imagenet-200.zip", lambda: {"t.zip": packed({f"tiny-imagenet-200/{name}": content for name, content in TINY.items()})}, "imagenet:IN/t.zip OUT", 0, ("n01443537 0, n01629819 1",)),
    Row("CelebA, given Img", lambda: CELEBA, "celeba:IN/Img OUT", 0, ("OUT/train: 1 images", "OUT/test: 1 images")),
    Row("CelebA, a partition with fewer lines", lambda: CELEBA | {"Eval/list_eval_partition.txt": PARTITION[:28]}, f"celeba:IN OUT {EACH}", 0, ("1 of 3 images", "does not name them")),
    Row("CelebA, the zip", lambda: {"Img/img_align_celeba.zip": packed({f"img_align_celeba/{name}": content for name, content in FACES.items()}), "Eval/list_eval_partition.txt": PARTITION}, "celeba:IN OUT", 0, ("OUT/train: 1 images", "OUT/test: 1 images")),
    Row("one folder with all images", lambda: images("photos"), f"folder:IN OUT {EACH}", 0, ("photos, which is no class",)),
    Row("@eaDir, __MACOSX", lambda: images("ant", "bee", "@eaDir", "__MACOSX"), f"folder:IN OUT {EACH}", 0, ("1 folders @eaDir", "1 folders __MACOSX", "ant 2, bee 2")),
    Row("MNIST/raw further below", lambda: {"MNIST/raw/train-images-idx3-ubyte.gz": idx(np.zeros((1, 4, 4)))}, "idx:IN OUT", 3, ("did you mean idx:IN/MNIST/raw?",)),
    Row("a zip with train/ and val/", lambda: {"a.zip": packed(images("a/train/ant", "a/train/bee", "a/val/ant"))}, "folder:IN/a.zip OUT", 0, ("the images are read from IN/a.zip/a", "OUT/val: 2 images")),
    Row("train.zip and val.zip", lambda: {f"{split}.zip": packed(images(f"{split}/ant", f"{split}/bee")) for split in ("train", "val")}, "folder:IN OUT", 0, ("OUT/train: 4 images", "OUT/val: 4 images")),
    Row("a .tar.gz of classes", lambda: {"a.tar.gz": gzip.compress(tar(images("ant", "bee")))}, f"folder:IN/a.tar.gz OUT {EACH}", 0, ("ant 2, bee 2",)),
    Row("a zip that is cut", lambda: {"a.zip": packed(images("ant", "bee"))[:200]}, "folder:IN/a.zip OUT", 3, ("is cut or is no zip", "fetch it again")),
    Row("zips in a zip", lambda: {"a.zip": packed({"train.zip": b"x", "test1.zip": b"x"})}, "folder:IN/a.zip OUT", 3, ("2 .zip files are archives",)),
    Row("LSUN", lsun, "lsun:IN OUT", 0, ("OUT/train: 1 images", "OUT/val: 1 images")),
    Row("LSUN, a few images of one database", lambda folder: lsun(folder, number=3), "lsun:IN/church_outdoor_train_lmdb OUT", 0, ("val: 1 of the 3 images of train",)),
    Row("Omniglot", lambda: OMNIGLOT, "folder:IN OUT", 0, ("Greek/character01 1, Latin/character01 1, Tengwar/character01 0", "OUT/test: 1 images 4x4x1")),
    Row("npy files alone", lambda: {"1.npy": array(np.zeros((4, 4), np.uint8))}, f"folder:IN OUT {EACH}", 0, ("4x4x1 npy (1)",)),
    Row("int16 npy files", lambda: {"1.npy": array(np.zeros((4, 4), np.int16))}, f"folder:IN OUT {EACH} --skip-broken", 3, ("its values are int16, not uint8; keep them with --dtype int16",)),
    Row("HEIC", heic, f"folder:IN OUT {EACH}", 0, ("16x16x3 heif (1)",)),
    Row("JPEG XL", jxl, f"folder:IN OUT {EACH}", 0, ("16x16x3 jxl (1)",)),
    Row("tars with input.jpg and target.jpg", lambda: {"a.tar": tar(TWO_IMAGES)}, "--index-only IN", 3, ("--image-member",)),
    Row("the same, --image-member input.jpg", lambda: {"a.tar": tar(TWO_IMAGES)}, "--index-only IN --image-member input.jpg", 0, ("members left out: target.jpg (3)",)),
    Row("dots in names: 22.05.png", lambda: {"a.tar": tar({f"22.0{n}.png": saved() for n in range(3)})}, "--index-only IN", 3, ("split at the first dot",)),
    Row("members that do not follow each other", lambda: {"a.tar": tar({"a.png": saved(), "b.png": saved(), "a.cls": b"0"})}, "--index-only IN", 3, ("do not follow each other", "tar --sort=name")),
    Row("img2dataset's tars", lambda: {"00000.tar": tar(IMG2DATASET), "00000.parquet": b"", "00000_stats.json": b""}, "--index-only IN", 0, ("not tars in ", "left out: 1 .parquet, 1 .json")),
    Row("an index elsewhere", lambda: {"a.tar": tar(samples(png=saved()))}, "--index-only IN --index-dir OUT", 0, ("3 images",)),
    Row("a hard link among members", lambda: {"a.tar": tar(samples(png=saved()), link="link.png")}, "--index-only IN", 3, ("is a link", "--hard-dereference", "--skip-broken")),
    Row("the same, --skip-broken", lambda: {"a.tar": tar(samples(png=saved()), link="link.png")}, "--index-only IN --skip-broken", 0, ("3 images", "skipped")),
    Row("one key in every tar", lambda: {f"{n}.tar": tar({"a.png": saved(value=n)}) for n in range(2)}, "--index-only IN --jobs 1", 0, ("2 images",)),
    Row("all transparent", lambda: images("a", content=saved(mode="RGBA")), "folder:IN OUT", 3, ("--flatten white",)),
    Row("all transparent, --flatten white", lambda: images("a", content=saved(mode="RGBA")), f"folder:IN OUT {EACH} --flatten white", 0, ("put on the colour of --flatten",)),
    Row("an option without effect", lambda: {"a.tar": tar(samples(png=saved()))}, "--index-only IN --size 8", 2, ("--size is for shards that are written",)),
    Row("a TIFF of 3 pages", lambda: {"a.tiff": PAGES}, f"folder:IN OUT {EACH}", 3, ("it has 3 pages",)),
    Row("an empty file", lambda: {"a.png": b"", "b.png": saved()}, f"folder:IN OUT {EACH}", 3, ("a.png: it is empty (0 bytes)", "--skip-broken")),
    Row("a broken ICC profile", lambda: {"a.png": saved(icc_profile=b"no profile" * 20)}, f"folder:IN OUT {EACH} --size 4", 0, ("1 of 1 images have a broken ICC profile, which is ignored",)),
    Row("grey among colour", lambda: {"a.png": saved(mode="L"), "b.png": saved()}, f"folder:IN OUT {EACH}", 0, ("1 of 2 images have 1 channel",)),
    Row("48x96 with --size 48", lambda: {"a.png": saved(size=(96, 48))}, f"folder:IN OUT {EACH} --size 48", 0, ("leaves out 50% of their pixels", "--crop whole")),
    Row("the phantom as 8-bit images", lambda: {"a.png": saved()}, "phantom OUT", 2, ("--dtype (=uint8) must be int16 for phantom",)),
    Row("half of a --size", lambda: {"a.png": saved()}, "folder:IN OUT --size 48x", 2, ("'48x' must be a side, or HEIGHTxWIDTH such as 48x96",)),
    Row("a JPEG named .png", lambda: {"a.png": saved("JPEG"), "b.jpg": saved("BMP")}, f"folder:IN OUT {EACH}", 0, ("4x4x3 jpg (1)", "4x4x3 bmp (1)")),
    Row("an .npz named .npy", lambda: {"a.npy": stack()}, f"arrays:IN/a.npy OUT {EACH}", 0, ("OUT/train: 3 images 4x4x1",)),
    Row("an .npy named .mat", lambda: {"a.mat": array(STACK)}, f"arrays:IN/a.mat OUT {EACH}", 0, ("OUT/train: 3 images 4x4x1",)),
    Row("an HTML page named .npz", lambda: {"a.npz": b"<html></html>"}, "arrays:IN/a.npz OUT", 3, ("holds no arrays: it is an HTML page", "fetch it again")),
    Row("a tar named .zip", lambda: {"a.zip": tar(images("ant", "bee"))}, f"folder:IN/a.zip OUT {EACH}", 0, ("ant 2, bee 2",)),
    Row("an HTML page named .tar", lambda: {"a.tar": b"<html></html>"}, "folder:IN/a.tar OUT", 3, ("is no archive: it is an HTML page",)),
    Row("idx files that are unpacked and named .gz", lambda: {"train-images-idx3-ubyte.gz": gzip.decompress(idx(STACK))}, f"idx:IN OUT {EACH}", 0, ("OUT/train: 3 images",)),
    Row("idx files that are packed and not named .gz", lambda: {"train-images-idx3-ubyte": idx(STACK)}, f"idx:IN OUT {EACH}", 0, ("OUT/train: 3 images",)),
    Row("NaN in an array", lambda: {"a.npy": array(np.where(np.arange(3)[:, None, None] == 2, np.nan, STACK))}, "arrays:IN OUT", 3, ("image 2 holds NaN or infinite values (16)", "numpy.nan_to_num")),
    Row("float images in .npy files", lambda: {"a.npy": array(np.ones((4, 4), np.float32))}, f"folder:IN OUT {EACH}", 3, ("its values are float32, not uint8; keep them with --dtype float32",)),
    Row("fractions chosen as labels", lambda: {"a.npz": stack(y=np.linspace(0, 1, 3))}, "arrays:IN OUT --column label=y", 2, ("--column label=y: ", "its values are no whole numbers; choose another array, or none with --column label=")),
    Row("labels given as images", lambda: {"a.npz": stack(y=np.zeros(3, np.int64))}, "arrays:IN OUT --column image=y", 3, ("(y) has the shape [3]; images must be [N, H, W]",)),
    Row("one column named twice", lambda: {"a.npz": stack(y=np.zeros(3, np.int64))}, "arrays:IN OUT --column image=x,image=y", 2, ("names one of them twice",)),
    Row("a zip of pictures as arrays", lambda: {"a.zip": packed(images("ant"))}, "arrays:IN/a.zip OUT", 3, ("did you mean folder:IN/a.zip?",)),
    Row("a zip of arrays as pictures", lambda: {"a.zip": packed({"a.npz": stack()})}, "folder:IN/a.zip OUT", 3, ("it holds 1 .npz", "unpack it and give its arrays as arrays:PATH")),
    Row("an empty val/ beside train/", lambda folder: empty_val(folder), "folder:IN OUT", 3, ("IN/val holds no", "delete it, or leave it out with --splits train=train")),
    Row("the same, --splits", lambda folder: empty_val(folder), "folder:IN OUT --splits train=train", 0, ("val: 1 of the 4 images",)),
    Row("an empty batch of CIFAR", lambda: {"data_batch_1": b""}, "cifar:IN OUT", 3, ("data_batch_1 is no CIFAR batch: it is empty (0 bytes)",)),
    Row("one batch of CIFAR", lambda: {"data_batch_1.bin": bytes(3073)}, "cifar:IN/data_batch_1.bin OUT", 3, ("is a file; did you mean cifar:IN?",)),
    Row("a line break in a name", lambda: {"a\nb.png": b"no image", "c.png": saved()}, f"folder:IN OUT {EACH} --skip-broken", 0, ("skipped IN/a\\nb.png: it begins with",)),
    Row("OUT is a file", lambda: {"a.png": saved()}, "folder:IN IN/a.png", 2, ("is a file; choose another",)),
    Row("--dry-run --limit 1", lambda: images("ant", "bee"), f"folder:IN OUT {EACH} --dry-run --limit 1", 0, ("train: 1 images",)),
    Row("--limit of what is held out", lambda: images("ant", each=9), "folder:IN OUT --holdout 0.5 --limit 2", 0, ("val: 2 images, of about 50% of all of train; --limit takes at most 2", "OUT/val: 2 images")),
]  # fmt: skip


def build(row: Row, folder: Path) -> None:
    """Write the files of a row."""
    try:
        files = row.files()  # type: ignore[call-arg]
    except TypeError:
        row.files(folder)  # type: ignore[call-arg]
        return
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def words_of(row: Row, folder: Path) -> list[str]:
    places = {"IN": f"{folder}/in", "OUT": f"{folder}/out"}
    return [
        "make-shards",
        *(
            word.replace("IN", places["IN"], 1)
            if word.startswith("IN") or ":IN" in word
            else places.get(word, word)
            for word in row.words.split()
        ),
    ]


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
def test_what_people_bring(vaescale, tmp_path: Path, row: Row) -> None:
    build(row, tmp_path / "in")
    outcome = vaescale(*words_of(row, tmp_path))
    text = " ".join((outcome.out + outcome.err).split())
    assert outcome.code == row.code, text
    assert "Traceback" not in text
    for words in row.said:
        assert words.replace("IN", f"{tmp_path}/in").replace("OUT", f"{tmp_path}/out") in text, text


def main() -> None:
    """Print the table in Markdown: the input, the exit code, what is said."""
    from vaescale.cli import main as command

    for row in ROWS:
        with tempfile.TemporaryDirectory() as name:
            build(row, Path(name) / "in")
            shown = io.StringIO()
            with redirect_stdout(shown), redirect_stderr(shown):
                code = command(words_of(row, Path(name)))
            lines = shown.getvalue().replace(f"{name}/in", "IN").replace(f"{name}/out", "OUT").splitlines()
            lines = [line.strip() for line in lines if not line.startswith(("write ", "index ", "look at "))]
            sys.stdout.write(f"| {row.name} | `{row.words}` | {code} | {' / '.join(lines)[:600]} |\n")


if __name__ == "__main__":
    main()
