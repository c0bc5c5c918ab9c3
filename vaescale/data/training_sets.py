"""The training images of a recipe: one set or several, with one numbering of the classes, and the plan that draws from them."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vaescale import comm
from vaescale.data.config import BalanceConfig, DataConfig
from vaescale.data.indexes import open_index
from vaescale.data.mixed_plan import Members, MixedPlan, Part
from vaescale.data.mixed_reader import MixedReader, MixtureReader
from vaescale.data.plan import Plan
from vaescale.data.reader import ShardReader, open_reader
from vaescale.errors import DataError
from vaescale.system.console import say
from vaescale.system.secrets import redact


def open_training(config: DataConfig, val_names: tuple[str, ...]) -> ShardReader:
    """The reader of all training images, each once. val_names: the classes of the held-out set, which keep their numbers.

    Raises DataError for sets that do not fit the recipe or one another.
    """
    readers = [open_reader(one.path, config) for one in config.sets]
    if len(readers) == 1:
        return readers[0]
    _refuse_other_channels(readers)
    _number_classes(readers, val_names)
    return MixedReader(readers)


def refuse_held_out(reader: ShardReader, val_reader: ShardReader) -> None:
    """Raise DataError where the held-out set is one of several training sets: the same folder, or a copy of its shards."""
    held_out = val_reader.index
    same = [one.index for one in reader.sets if one.index.data_hash == held_out.data_hash]
    if same and len(reader.sets) > 1:
        raise DataError(
            f"data.train mixes in {redact(same[0].place)}, whose {same[0].num_samples} images are those of data.val "
            f"(={redact(held_out.place)}); take it out of one of them"
        )


def tell_repeated(readers: Sequence[ShardReader], channels: int) -> None:
    """Say how many grey images a recipe reads as images of several equal channels, if any. A set of several sizes says so when it is made."""
    sets = {one.index.place: one.index for reader in readers for one in reader.sets}
    grey = {
        place: index.num_samples for place, index in sets.items() if index.image and index.image[2] < channels
    }
    if grey and comm.rank() == 0:
        places = ", ".join(f"{number} of {redact(place)}" for place, number in grey.items())
        say(
            f"{sum(grey.values())} images are grey ({places}); data.channels={channels} repeats their one channel, which counts each value "
            f"{channels} times; data.channels=1 takes them as they are"
        )


def training_plan(reader: ShardReader, config: DataConfig, seed: int) -> Plan | MixedPlan:
    """The order in which training draws from what `open_training` returns. Raises DataError for a class that is missing."""
    if not config.is_mixed:
        return Plan(reader.index.shards.samples, config.global_batch, seed, config.shuffle_block)
    readers = reader.readers if isinstance(reader, MixedReader) else (reader,)
    parts = tuple(
        Part(
            one.index.shards.samples,
            float(len(one)) if of_set.weight is None else of_set.weight,
            _balanced(one, config.balance) if config.balance else (),
        )
        for one, of_set in zip(readers, config.sets, strict=True)
    )
    return MixedPlan(parts, config.global_batch, seed, config.shuffle_block)


def open_mixture(config: DataConfig, seed: int) -> ShardReader:
    """The training images as training draws them, for what measures them: of one set each image once, of a mixture an epoch."""
    if not config.is_mixed:
        return open_reader(config.sets[0].path, config)
    reader = open_training(config, _classes_of_val(config))
    plan = training_plan(reader, config, seed)
    assert isinstance(plan, MixedPlan)
    if comm.rank() == 0:
        say(f"the training images are {describe_mixture(reader, plan)['words']}")
    return as_drawn(reader, plan)


def as_drawn(reader: ShardReader, plan: Plan | MixedPlan) -> ShardReader:
    """The images of what `open_training` returns, each as often as an epoch of training has it."""
    return MixtureReader(reader, plan) if isinstance(plan, MixedPlan) else reader


def describe_mixture(reader: ShardReader, plan: MixedPlan) -> dict[str, Any]:
    """What an epoch reads, in words and numbers: for each set its images, share and passes, and those of each balanced class."""
    counts, strand, rows = plan.shares.counts(plan.num_samples), 0, []
    readers = reader.readers if isinstance(reader, MixedReader) else (reader,)
    for one, part, passes in zip(readers, plan.parts, plan.passes(), strict=True):
        of_set = counts[strand : strand + (len(part.classes) or 1)]
        row: dict[str, Any] = {
            "path": redact(one.index.place),
            "images": part.size,
            "share": round(float(of_set.sum() / plan.num_samples), 6),
            "passes_per_epoch": round(passes, 4),
        }
        if part.classes:
            row["classes"] = {
                _class_name(one, members.label): {
                    "images": len(members.numbers),
                    "share": round(float(count / of_set.sum()), 6),
                    "passes_per_epoch": round(float(count / len(members.numbers)), 4),
                }
                for members, count in zip(part.classes, of_set.tolist(), strict=True)
            }
        strand += len(of_set)
        rows.append(row)
    return {"words": _sentence(plan.num_samples, rows), "epoch_images": plan.num_samples, "sets": rows}


def _sentence(images: int, rows: list[dict[str, Any]]) -> str:
    words = []
    for row in rows:
        text = f"{row['path']} {row['passes_per_epoch']:.3g} passes ({row['share']:.1%} of the images)"
        if of_class := row.get("classes"):
            sizes = [one["images"] for one in of_class.values()]
            passes = [one["passes_per_epoch"] for one in of_class.values()]
            text += f", its {len(sizes)} classes of {min(sizes)} to {max(sizes)} images balanced: {min(passes):.3g} to {max(passes):.3g} passes"
        words.append(text)
    return f"an epoch of the mixture, {images} images: {'; '.join(words)}"


def _balanced(reader: ShardReader, balance: BalanceConfig) -> list[Members]:
    """The classes of a set with their samples. Raises DataError where an image has none."""
    labels = reader.labels()
    missing = int((labels < 0).sum())
    if missing:
        raise DataError(
            f"data.balance needs the class of each image, and {missing} of {len(labels)} images of {reader.index.place} have none; "
            "write the shards again with classes, or set data.balance to null"
        )
    order = np.argsort(labels, kind="stable")
    numbers, starts = np.unique(labels[order], return_index=True)
    members: list[NDArray[np.int64]] = np.split(order, starts[1:])
    return [
        Members(label, float(len(of_class) ** balance.power), of_class)
        for label, of_class in zip(numbers.tolist(), members, strict=True)
    ]


def _class_name(reader: ShardReader, label: int) -> str:
    names = reader.index.class_names
    return names[label] if label < len(names) else str(label)


def _classes_of_val(config: DataConfig) -> tuple[str, ...]:
    """The names of the held-out classes, where the numbers of training classes depend on them."""
    if len(config.sets) == 1:
        return ()
    return open_index(
        config.val,
        cache=config.cache_dir,
        cache_bytes=config.cache_bytes,
        retry_seconds=config.retry_seconds,
    ).class_names


def _refuse_other_channels(readers: list[ShardReader]) -> None:
    """Raise DataError for sets of other channels than the first one has."""
    channels = [(reader, reader.index.image[2]) for reader in readers if reader.index.image]
    for other, number in channels[1:]:
        first, wanted = channels[0]
        if number != wanted:
            raise DataError(
                f"data.train mixes {len(first)} images of {wanted} channels ({first.index.place}) with {len(other)} of {number} "
                f"({other.index.place}); write one of them again to another folder with --channels"
            )


def _number_classes(readers: list[ShardReader], val_names: tuple[str, ...]) -> None:
    """Number the classes of all sets by name: those of the held-out set first, then each new name of the sets in order.

    Without names in any set, classes are the same if their numbers are. Raises DataError for a set whose classes have no names
    where another's have some.
    """
    every_name = [reader.index.class_names for reader in readers]
    if not any(every_name):
        return
    known = list(dict.fromkeys([*val_names, *(name for names in every_name for name in names)]))
    for reader, names in zip(readers, every_name, strict=True):
        if names and len(set(names)) < len(names):
            twice = Counter(names).most_common(1)[0]
            raise DataError(
                f"{reader.index.place} has {twice[1]} classes of the name {twice[0]!r}, so its {len(names)} classes cannot be matched by "
                "name; write the shards again with other names"
            )
        if not names and (most := reader.most_class()) >= 0:
            named = next(other for other in readers if other.index.class_names)
            raise DataError(
                f"{reader.index.place} numbers its classes up to {most} and names none, {named.index.place} names "
                f"{len(named.index.class_names)}, so they cannot be matched; write the shards again with the same names"
            )
        reader.number_classes(tuple(known))
    if comm.rank() == 0:
        sizes = ", ".join(
            f"{len(r)} of {reader.index.place}" for r, reader in zip(every_name, readers, strict=True)
        )
        say(f"classes are matched by name: {sizes}, {len(known)} in all")
