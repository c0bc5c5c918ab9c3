"""TFRecord files of the robot pushing set: made here in the layout of the published ones, which are not at hand."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vaescale.data.config import DataConfig
from vaescale.data.making.items import Clip
from vaescale.data.making.sources import open_source
from vaescale.data.making.sources.tfrecords import bytes_features, crc32c, list_records, masked
from vaescale.data.making.storing import Making
from vaescale.data.making.survey import survey
from vaescale.data.making.writing import write_shards
from vaescale.data.reader import open_reader
from vaescale.errors import DataError, UserError

SHAPE = (64, 64, 3)


def varint(value: int) -> bytes:
    content = b""
    while value > 0x7F:
        content += bytes([value & 0x7F | 0x80])
        value >>= 7
    return content + bytes([value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


def example(features: dict[str, bytes | list[float]]) -> bytes:
    """A tf.train.Example of lists of bytes and of floats."""
    entries = b""
    for name, value in features.items():
        one = (
            field(1, field(1, value))
            if isinstance(value, bytes)
            else field(2, field(1, struct.pack(f"<{len(value)}f", *value)))
        )
        entries += field(1, field(1, name.encode()) + field(2, one))
    return field(1, entries)


def framed(content: bytes) -> bytes:
    length = struct.pack("<Q", len(content))
    checks = [struct.pack("<I", masked(crc32c(part))) for part in (length, content)]
    return length + checks[0] + content + checks[1]


def sequence(value: int, length: int = 4, **changes: Any) -> bytes:
    """A record whose frames have the levels from `value` on, with an action for each, as the published ones have."""
    features: dict[str, bytes | list[float]] = {}
    for number in range(length):
        for camera, more in (("image_main", 100), ("image_aux1", 0)):
            features[f"{number}/{camera}/encoded"] = np.full(SHAPE, value + number + more, np.uint8).tobytes()
        features[f"{number}/action"] = [0.1, 0.2, 0.3, 0.4]
    return example({name: each for name, each in (features | changes).items() if each is not None})


def write(folder: Path, split: str, records: list[bytes], name: str = "traj_0_to_255.tfrecords") -> Path:
    (folder / split).mkdir(parents=True, exist_ok=True)
    path = folder / split / name
    path.write_bytes(b"".join(map(framed, records)))
    return path


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"123456789", 0xE3069283),
        (bytes(32), 0x8A9136AA),  # the examples of RFC 3720, B.4
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ],
)
def test_checksums_are_those_of_the_standard(content: bytes, expected: int) -> None:
    assert crc32c(content) == expected


def test_long_checksums_are_those_byte_by_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    from vaescale.data.making.sources import tfrecords

    contents = [np.random.default_rng(size).bytes(size) for size in (4096, 4097, 9999)]
    side_by_side = [crc32c(content) for content in contents]
    monkeypatch.setattr(tfrecords, "LANES", 1 << 20)  # so that each is too short for it
    assert [crc32c(content) for content in contents] == side_by_side


def test_sequences_are_written_and_read(tmp_path: Path) -> None:
    source = tmp_path / "softmotion30_44k"
    write(source, "train", [sequence(10), sequence(20)], "traj_1000_to_1255.tfrecords")
    write(source, "train", [sequence(30, 5)], "traj_256_to_511.tfrecords")
    write(source, "test", [sequence(40)])
    opened = open_source(f"bair:{tmp_path}")  # the folder above is fine, too
    assert sorted(opened.splits) == ["test", "train"]
    split = opened.splits["train"]()
    assert split.number == 3
    assert survey(split, Making())["shapes"] == {"64x64x3 frames": 3}
    written = write_shards(split.items, tmp_path / "out", Making(encoding="npy"), made={"kind": "sequences"})
    assert written.shards.made["lengths"] == {"4": 2, "5": 1}
    keys = {"train": "a", "val": "b", "image_size": 64, "channels": 3, "global_batch": 2}
    config = DataConfig.model_validate({**keys, "holds": "sequences", "frames": 4})
    fetched = open_reader(str(tmp_path / "out"), config).__getitems__(slice_of(3))
    assert fetched.images[:, :, 0, 0, 0].tolist() == [[30, 31, 32, 33], [10, 11, 12, 13], [20, 21, 22, 23]]
    assert fetched.keys == ("traj_256_to_511_000000", "traj_1000_to_1255_000000", "traj_1000_to_1255_000001")
    main = open_source(f"bair:{tmp_path}", column="image=image_main").splits["test"]()
    (item,) = main.items
    assert isinstance(item.content, Clip)
    assert [int(np.asarray(frame)[0, 0, 0]) for frame in item.content.frames] == [140, 141, 142, 143]


def slice_of(number: int) -> Any:
    from vaescale.data.batch import Request

    return Request(np.arange(number))


BROKEN = {
    "a missing frame": (sequence(0, **{"2/image_aux1/encoded": None}), "misses frame 2 of 0 to 3"),
    "another camera": (
        example({"0/image_main/encoded": b"x"}),
        "no frames of image_aux1; its cameras are image_main",
    ),
    "no frames": (example({"action": [1.0]}), "its cameras are none"),
    "another size": (
        sequence(0, **{"1/image_aux1/encoded": b"123"}),
        "frame 1 has 3 bytes, not those of 64x64x3",
    ),
    "no message": (b"\xff" * 30, "no tf.train.Example: an integer has too many bytes"),
    "a long field": (varint(1 << 3 | 2) + varint(1 << 40), "exceeds its message"),
    "a cut integer": (b"\x80", "an integer is cut"),
    "a group": (b"\x0b", "unknown wire type 3"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_record_that_cannot_be_used_is_named(tmp_path: Path, name: str) -> None:
    content, words = BROKEN[name]
    write(tmp_path, "train", [sequence(10), content, sequence(20)])
    split = open_source(f"bair:{tmp_path}", holdout=0).splits["train"]
    with pytest.raises(DataError, match=f"sequence traj_0_to_255_000001: .*{words}.*--skip-broken"):
        write_shards(split().items, tmp_path / "a", Making(encoding="npy"), made={"kind": "sequences"})
    making = Making(encoding="npy", skip_broken=True)
    written = write_shards(
        open_source(f"bair:{tmp_path}", holdout=0).splits["train"]().items, tmp_path / "b", making
    )
    assert written.shards.num_samples == 2
    assert words in written.skipped[0]


def test_damage_is_found_by_the_checksums(tmp_path: Path) -> None:
    path = write(tmp_path, "train", [sequence(10), sequence(20), sequence(30)])
    whole = path.read_bytes()
    records = list_records(path)
    assert [whole[one.offset : one.offset + one.bytes] for one in records] == [
        sequence(n) for n in (10, 20, 30)
    ]

    def changed(at: int) -> bytes:
        return whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :]

    path.write_bytes(changed(records[1].offset + 5000))
    items = open_source(f"bair:{tmp_path}", holdout=0).splits["train"]().items
    faults = [item.content.fault for item in items]
    assert faults[0] is faults[2] is None
    assert faults[1] == ("damaged", "its crc32c is not the one that its file states")
    path.write_bytes(changed(records[1].offset - 10))
    with pytest.raises(
        DataError, match=r"wrong crc32c of the length of record 1 at byte \d+: it is damaged or no TFRecord"
    ):
        list_records(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"has a record of \d+ bytes at byte \d+, and is cut; fetch it again"):
        list_records(path)
    path.write_bytes(whole + b"123")
    with pytest.raises(DataError, match="is cut in the length of record 3"):
        list_records(path)
    length = struct.pack("<Q", 1 << 40)
    path.write_bytes(length + struct.pack("<I", masked(crc32c(length))))
    with pytest.raises(DataError, match="a record of 1099511627776 bytes at byte 0, more than"):
        list_records(path)


def test_features_are_read_as_protobuf_writes_them() -> None:
    """An example written by the protobuf package, from a description of the message, packed numbers included."""
    descriptors = pytest.importorskip("google.protobuf.descriptor_pb2")
    from google.protobuf import descriptor_pool, message_factory

    file = descriptors.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")
    kinds = descriptors.FieldDescriptorProto

    def message(name: str, *fields: tuple[str, int, int, str], parent: Any = file.message_type) -> Any:
        added = parent.add(name=name)
        for field_name, number, kind, of in fields:
            label = kinds.LABEL_REPEATED if of.endswith("*") else kinds.LABEL_OPTIONAL
            added.field.add(
                name=field_name, number=number, type=kind, label=label, type_name=of.rstrip("*") or None
            )
        return added

    message("BytesList", ("value", 1, kinds.TYPE_BYTES, "*"))
    message("FloatList", ("value", 1, kinds.TYPE_FLOAT, "*"))
    message(
        "Feature",
        ("bytes_list", 1, kinds.TYPE_MESSAGE, ".t.BytesList"),
        ("float_list", 2, kinds.TYPE_MESSAGE, ".t.FloatList"),
    )
    features = message("Features", ("feature", 1, kinds.TYPE_MESSAGE, ".t.Features.FeatureEntry*"))
    entry = message(
        "FeatureEntry",
        ("key", 1, kinds.TYPE_STRING, ""),
        ("value", 2, kinds.TYPE_MESSAGE, ".t.Feature"),
        parent=features.nested_type,
    )
    entry.options.map_entry = True
    message("Example", ("features", 1, kinds.TYPE_MESSAGE, ".t.Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    one = message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))()
    one.features.feature["0/image_aux1/encoded"].bytes_list.value.append(b"frame" * 100)
    one.features.feature["a"].bytes_list.value.extend([b"first", b"second"])
    one.features.feature["0/action"].float_list.value.extend([1.0, 2.0])
    content = one.SerializeToString()
    assert bytes_features(content) == {"0/image_aux1/encoded": b"frame" * 100, "a": b"first"}
    assert bytes_features(
        content + varint(3 << 3) + varint(300) + varint(4 << 3 | 5) + b"1234"
    ) == bytes_features(content)


def test_what_is_no_such_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \*.tfrecords files in folders train and test"):
        open_source(f"bair:{tmp_path}")
    write(tmp_path, "train", [sequence(1)])
    with pytest.raises(DataError, match=rf"did you mean bair:{tmp_path}\?"):
        open_source(f"folder:{tmp_path}").splits["train"]()
    with pytest.raises(UserError, match=r"--column .=label=x. of bair: must be image=CAMERA"):
        open_source(f"bair:{tmp_path}", column="label=x")
