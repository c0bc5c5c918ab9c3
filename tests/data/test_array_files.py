"""Every container of arrays gives the same images; damaged and lying files are one sentence."""

import struct
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse
from scipy.io import loadmat, savemat

from tests.data.test_arrays import GREY, LABELS, RGB, assert_holds, items_of
from vaescale.data.making.sources import stored
from vaescale.data.making.sources.array_files import open_arrays
from vaescale.data.making.sources.stored import Deflated, Raw
from vaescale.errors import DataError, UserError

LAYOUTS = {
    "NHWC": (RGB, RGB),
    "NCHW": (RGB.transpose(0, 3, 1, 2), RGB),
    "HWCN": (RGB.transpose(1, 2, 3, 0), RGB),
    "NHW1": (GREY, GREY),
    "N1HW": (GREY.transpose(0, 3, 1, 2), GREY),
    "NHW": (GREY[..., 0], GREY),
}


@pytest.fixture(params=["npy", "npz", "compressed npz", "fortran npy", "fortran npz", "mat", "h5", "mat 7.3"])
def save(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Write arrays by key to one file, or to .npy files of a folder. Returns the path for arrays:."""

    def written(**values: np.ndarray) -> Path:
        kind = request.param
        order = np.asfortranarray if "fortran" in kind else np.ascontiguousarray
        values = {key: order(value) for key, value in values.items()}
        suffix = {"compressed npz": "npz", "fortran npz": "npz", "mat 7.3": "mat"}.get(kind, kind)
        path = tmp_path / f"set.{suffix}"
        if kind.endswith("npy"):
            path.mkdir()
            for key, value in values.items():
                np.save(path / f"{key}.npy", value)
        elif kind.endswith("npz"):
            (np.savez_compressed if kind[0] == "c" else np.savez)(path, **values)
        elif kind == "mat":
            savemat(path, values, do_compression=True)
        else:
            h5py = pytest.importorskip("h5py")
            with h5py.File(path, "w", userblock_size=512 if kind[0] == "m" else None) as file:
                for key, value in values.items():
                    value = np.atleast_2d(value) if kind[0] == "m" else value
                    file[key] = value.T if kind[0] == "m" else value
        return path

    return written


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_read_from_every_container(
    layout: str, save: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "BLOCK_BYTES", 200)  # several blocks, of which the last is shorter
    values, images = LAYOUTS[layout]
    path = save(images=values, labels=LABELS)
    assert_holds(items_of(f"arrays:{path}")["train"], images, LABELS)


@pytest.mark.parametrize("packed", [False, True])
def test_matlab_files_are_read_as_scipy_reads_them(packed: bool, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    kinds = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8")
    arrays = {f"of_{kind}": (rng.random((3, 4, 2, 5)) * 100).astype(kind) for kind in kinds}
    arrays |= {
        "flags": rng.random((2, 3)) > 0.5,
        "number": np.array([[7]], np.uint8),
        "empty": np.zeros((0, 3)),
    }
    others = {"cell": np.array(["a", [1]], object), "record": {"a": RGB}, "text": "abc", "complex": RGB * 1j}
    path = tmp_path / "a.mat"
    savemat(path, {**arrays, **others, "sparse": sparse.eye(3)}, do_compression=packed)
    found, reference = open_arrays(path), loadmat(path)
    assert found.arrays.keys() == arrays.keys()
    for key, array in found.arrays.items():
        assert isinstance(array, Deflated if packed else Raw)
        for axis in range(len(array.shape)):
            blocks = list(array._slices(axis, 2))
            assert np.array_equal(
                np.concatenate(blocks, axis) if blocks else np.zeros((0, 3)), reference[key]
            )
    assert found.left_out == {
        "cell": "a MATLAB cell",
        "record": "a MATLAB struct",
        "text": "a MATLAB char",
        "complex": "a MATLAB array of complex numbers",
        "sparse": "a MATLAB sparse",
    }


def test_a_big_endian_matlab_file(tmp_path: Path) -> None:
    """As MATLAB wrote on other machines: elements of MATRIX, with a name that fits into its tag."""
    values = np.arange(6, dtype=">u2").reshape(3, 2)
    header = struct.pack(">IIII", 6, 8, 11, 0) + struct.pack(">IIii", 5, 8, *values.shape)
    header += struct.pack(">HH4s", 1, 1, b"x") + struct.pack(">II", 4, values.nbytes)
    content = header + values.tobytes("F") + bytes(-values.nbytes % 8)
    path = tmp_path / "a.mat"
    path.write_bytes(b" " * 124 + b"\x01\x00MI" + struct.pack(">II", 14, len(content)) + content)
    assert np.array_equal(open_arrays(path).arrays["x"].whole(), values)
    assert np.array_equal(loadmat(path)["x"], values), "SciPy reads the same"


def test_a_change_in_a_compressed_array_is_found(tmp_path: Path) -> None:
    savemat(tmp_path / "a.mat", {"images": RGB.transpose(1, 2, 3, 0)}, do_compression=True)
    np.savez_compressed(tmp_path / "a.npz", images=RGB)
    for name in ("a.mat", "a.npz"):
        path = tmp_path / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"{name}.*cannot be read"):
            items_of(f"arrays:{path}")


def npy_header(shape: str, descr: str = "|u1") -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header + b"\n"


def test_files_that_claim_more_than_they_hold_are_refused(tmp_path: Path) -> None:
    claims = npy_header("(10000000, 1000, 1000)")
    (tmp_path / "a.npy").write_bytes(claims + b"abc")
    with pytest.raises(
        DataError, match=r"a\.npy holds 3 bytes, its header names uint8 \[10000000, 1000, 1000\]"
    ):
        items_of(f"arrays:{tmp_path}/a.npy")
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("images.npy", claims + b"abc")
    with pytest.raises(DataError, match=r"b\.npz \(images\) holds 3 bytes"):
        items_of(f"arrays:{tmp_path}/b.npz")
    for shape in ("(-1, 8, 8)", "10", "(1e3, 8)", "(8, 8"):
        (tmp_path / "c.npy").write_bytes(npy_header(shape))
        with pytest.raises(DataError, match=r"c\.npy"):
            items_of(f"arrays:{tmp_path}/c.npy")


def test_a_zip_that_claims_too_much_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    header = npy_header("(1000000, 1000, 1000)")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", header + b"abc")
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = struct.pack("<I", 2**32 - 2)  # the size of what it expands to
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"claims that \d+ bytes expand to 4294967294; fetch it again"):
        items_of(f"arrays:{path}")


def test_an_hdf5_file_that_claims_too_much_is_refused(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("images", (10**9, 64, 64, 3), "u1", chunks=(10, 64, 64, 3))
    with pytest.raises(DataError, match="claims 12288000000000 bytes, of which 0 are stored"):
        items_of(f"arrays:{tmp_path}/a.h5")


def test_chunks_of_hdf5_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    h5py = pytest.importorskip("h5py")
    monkeypatch.setattr(stored, "BLOCK_BYTES", 3 * RGB[0].nbytes)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("images", data=RGB, chunks=(5, 3, 5, 3))
    array = open_arrays(tmp_path / "a.h5").arrays["images"]
    assert [len(block) for block in array.blocks()] == [5, 5, 2]
    assert np.array_equal(array.whole(), RGB)


def test_elements_in_other_files_are_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    h5py = pytest.importorskip("h5py")
    (tmp_path / "secret").write_bytes(RGB.tobytes())
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["images"] = RGB
        file.create_dataset("x", (12, 6, 5, 3), "u1", external=[(str(tmp_path / "secret"), 0, RGB.nbytes)])
        file["link"] = h5py.ExternalLink(str(tmp_path / "b.h5"), "images")
    assert_holds(items_of(f"arrays:{tmp_path}/a.h5")["train"], RGB)
    assert "left out: x (elements in other files)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.mat", "a.h5", "v73.mat"])
def test_damaged_files_are_one_sentence(name: str, tmp_path: Path) -> None:
    path, suffix = tmp_path / name, Path(name).suffix
    if suffix == ".npy":
        np.save(path, RGB)
    elif suffix == ".npz":
        np.savez_compressed(path, images=RGB, labels=LABELS)
    elif name == "a.mat":
        savemat(path, {"images": RGB.transpose(1, 2, 3, 0), "labels": LABELS}, do_compression=True)
    else:
        h5py = pytest.importorskip("h5py")
        with h5py.File(path, "w", userblock_size=512 if suffix == ".mat" else None) as file:
            file.create_dataset(
                "images", data=RGB.T if suffix == ".mat" else RGB, chunks=True, compression="gzip"
            )
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for trial in range(60):
        changed = bytearray(content)
        if trial < 20:
            changed = changed[: trial * len(content) // 20]
        else:
            for place in rng.integers(0, min(len(content), 4000), 3):
                changed[place] = rng.integers(0, 256)
        path.unlink()
        path.write_bytes(changed)
        message = ""
        try:
            items_of(f"arrays:{path}")
        except (DataError, UserError) as error:
            message = str(error)
        refused += bool(message)
        assert not message or (path.name in message and "\n" not in message)
    assert refused > 20


def test_an_array_that_is_only_read_whole_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "MOST_WHOLE_BYTES", RGB.nbytes - 1)
    np.savez_compressed(tmp_path / "a.npz", images=RGB.transpose(1, 2, 3, 0))
    with pytest.raises(
        DataError, match=r"takes 1080 bytes.*save it with numpy\.save, the images along the first axis"
    ):
        items_of(f"arrays:{tmp_path}/a.npz")
    np.save(tmp_path / "a.npy", RGB)
    assert_holds(items_of(f"arrays:{tmp_path}/a.npy")["train"], RGB)
    with pytest.raises(DataError, match=r"a\.npz needs more memory than there is"), stored.reading("a.npz"):
        raise MemoryError


def test_a_file_that_may_not_be_read_is_not_called_damaged() -> None:
    with (
        pytest.raises(DataError, match=r"a\.npz cannot be read: Permission denied; change"),
        stored.reading("a.npz"),
    ):
        raise PermissionError(13, "Permission denied", "a.npz")


def test_a_file_of_objects_is_not_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{1: 2}], object))
    with pytest.raises(DataError, match=r"no array of images.*Python objects, which are not unpickled"):
        items_of(f"arrays:{tmp_path}/a.npy")


def test_without_h5py_the_package_is_named(
    vaescale: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    monkeypatch.setitem(sys.modules, "h5py", None)
    vaescale("make-shards", f"arrays:{tmp_path}/a.h5", tmp_path / "out").assert_refused(2, "pip install h5py")
