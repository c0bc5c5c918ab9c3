"""Recipes: a YAML file and `key=value` overrides, validated as one frozen model with the sections of other modules."""

import hashlib
import io
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, Field, ValidationError, model_validator

from vaescale.conditions.config import CONDITIONS, ConditionConfig, VectorCondition
from vaescale.config import Config, OneOf, Sizes
from vaescale.data.config import DataConfig, VectorMember
from vaescale.data.indexes import open_index
from vaescale.errors import UserError
from vaescale.figures.config import FiguresConfig, View
from vaescale.likelihoods.config import FORMER_DEFAULTS, LIKELIHOODS, LikelihoodConfig
from vaescale.models.config import POSTERIORS, DiagonalConfig, PosteriorConfig
from vaescale.networks.config import NETWORKS, NetworkConfig
from vaescale.objectives.config import OBJECTIVES, ElboConfig, ObjectiveConfig
from vaescale.recipe_faults import kinds_of, sentence
from vaescale.runs import origins
from vaescale.runs.tracking import TrackingConfig
from vaescale.system.plugins import import_installed
from vaescale.system.secrets import redact_all
from vaescale.system.shipped import PREFIX, shipped_file
from vaescale.system.yaml_scalars import AmbiguousNumberError, as_meant
from vaescale.training.config import InitConfig, OptimizerConfig, TrainingConfig

# Keys that may change between two starts of a run without a change of its numbers.
OPERATIONAL = {
    "name": True,
    "run_dir": True,
    "data": {
        *("train", "val", "cache", "workers"),
        *("max_skipped", "cache_dir", "cache_bytes", "retry_seconds"),
    },
    "training": {
        *("log_every", "evaluate_every", "checkpoint_every", "keep_checkpoints", "keep_every", "keep_best"),
        *("resume", "max_rollbacks", "watchdog_seconds", "compare_replicas_every", "cuda_graphs"),
        "epochs",  # steps say it
    },
    "optimizer": {"clip_norm_per_dimension", "skip_norm_per_dimension"},  # clip_norm and skip_norm say it
    "tracking": True,
    "figures": True,
    "init_from": {"path"},
}

# Keys that recipes did not have before, as section, key and default: a recipe without them has the hash that it had.
ADDED: tuple[tuple[str, str, Any], ...] = (
    ("optimizer", "schedule_start", 0),
    ("optimizer", "plateau", None),
    ("training", "early_stopping", None),
    ("data", "holds", "images"),
    ("data", "frames", None),
    ("data", "dtype", "uint8"),
    ("data", "range", None),
    ("data", "balance", None),
    ("data", "augment", None),
    ("training", "evaluate_images", None),
    ("optimizer", "decay", "kernels"),
    ("optimizer", "epsilon", 1e-8),
    ("optimizer", "warmup_from_zero", False),
    ("optimizer", "skip_norm", None),
    ("training", "ema_warmup", True),
    ("training", "ema_more", []),
    ("training", "ema_sigma_rel", []),
    ("network", "standardize", None),
    ("network", "freeze", []),
    ("network", "latent_map", False),
    ("network", "norm_groups", None),
    ("network", "norm_epsilon", 1e-5),
    ("posterior", "bounded", True),
    ("likelihood", "first_scale", 0.25),
    ("likelihood", "scale_ceiling", 20.0),
    ("objective", "equivariance", None),
    ("objective", "adversarial", None),
    ("objective", "perceptual", None),
    ("objective", "adversarial.ema_decay", None),
    ("objective", "discriminator.ema_decay", None),
)

FAULTS = (OmegaConfBaseException, yaml.YAMLError, OSError, ValueError, TypeError, RecursionError)


class Recipe(Config):
    """The complete description of a run."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="letters, digits, '.', '_' and '-'"
    )
    seed: int = Field(
        default=0, ge=0, lt=2**63, description="seed of the weights, the sample order and all noise"
    )
    run_dir: str = Field(default="runs/${name}", description="the run folder")
    data: DataConfig
    network: Annotated[NetworkConfig, OneOf(NETWORKS)]
    posterior: Annotated[PosteriorConfig, OneOf(POSTERIORS, default="diagonal")] = DiagonalConfig()
    likelihood: Annotated[LikelihoodConfig, OneOf(LIKELIHOODS)]
    objective: Annotated[ObjectiveConfig, OneOf(OBJECTIVES, default="elbo")] = ElboConfig()
    condition: Annotated[ConditionConfig | None, OneOf(CONDITIONS, default="class", optional=True)] = Field(
        default=None,
        description="an additional input for each image, its class or a vector, on which encoder and decoder depend; null: none",
    )
    init_from: InitConfig | None = Field(
        default=None, description="weights to begin from, a path or a section; null: random weights"
    )
    optimizer: OptimizerConfig
    training: TrainingConfig
    tracking: TrackingConfig = TrackingConfig()
    figures: FiguresConfig = FiguresConfig()

    @model_validator(mode="after")
    def _depends_on_the_sizes(self) -> "Recipe":  # each is itself, but for a number
        likelihood = self.likelihood.resolved(self.training.steps)
        self.__dict__["likelihood"] = likelihood.seen_in(self.data.window)
        predicted = 1 if self.data.frames is None else self.data.frames - 1
        dimensions = predicted * math.prod(self.data.image_shape)
        self.__dict__["optimizer"] = self.optimizer.resolved(dimensions)
        if isinstance(self.condition, VectorCondition):
            member = VectorMember(self.condition.member, self.condition.size)
            self.__dict__["data"] = self.data.with_vectors(member)
        return self

    @model_validator(mode="after")
    def _sections_fit_one_another(self) -> "Recipe":
        sections = self.sections()
        offered = {one for section in sections.values() for one in section.offers()}
        for section in sections.values():
            for need in section.needs():
                if need.property not in offered:
                    kind = getattr(sections[need.property.section], "kind", "")
                    section_kind = f" (kind {kind!r})" if kind else ""
                    raise ValueError(
                        f"{need.key} needs {need.property.meaning}, which the {need.property.section} section{section_kind} "
                        f"does not have; {need.remedy}"
                    )
            section.check_sizes(self._sizes())
        return self

    def sections(self) -> dict[str, Config]:
        """The recipe's sections by name."""
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: value for name, value in values.items() if isinstance(value, Config)}

    def _sizes(self) -> Sizes:
        batch = self.data.global_batch
        return Sizes(
            latent_dim=self.network.latent_dim,
            steps=self.training.steps,
            global_batch=batch,
            micro_batch=batch // self.training.accumulation,
            levels=self.data.window.levels,
            channels=self.data.channels,
            frames=self.data.frames,
        )

    @property
    def view(self) -> View:
        """How pictures show the images."""
        return self.figures.view(self.data.channels, self.data.window)

    def settings(self) -> dict[str, Any]:
        """The settings that decide the run's numbers: everything but paths, names and how often something is written."""
        content: dict[str, Any] = self.model_dump(mode="json", exclude=OPERATIONAL)  # type: ignore[arg-type]
        if self.training.early_stopping or self.optimizer.schedule == "plateau":
            content["training"]["evaluate_every"] = self.training.evaluate_every  # the evaluations decide
        if len(self.data.sets) > 1:
            content["data"]["train_weights"] = [one.weight for one in self.data.sets]
        return content

    def identity(self) -> dict[str, Any]:
        """The settings as the hash has them: without keys that recipes did not have before, at their defaults."""
        content = self.settings()
        for name in ("init_from", "condition"):
            if content[name] is None:
                del content[name]
        for section, keys, default in ADDED:
            *above, key = (section, *keys.split("."))
            inner: Any = content
            for name in above:
                inner = inner.get(name) or {}
            if key in inner and inner[key] == default:
                del inner[key]
        for name, former in FORMER_DEFAULTS.items():  # of keys without a meaning for this likelihood
            if content["likelihood"].get(name, former) is None:
                content["likelihood"][name] = former
        return content

    @property
    def hash(self) -> str:
        """Sha256 of the identity: two runs with one recipe hash and one data hash have the same curve."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """The resolved recipe as YAML without credentials. If there were none, loading it gives this recipe again."""
        return OmegaConf.to_yaml(OmegaConf.create(self.public()))

    def public(self) -> dict[str, Any]:
        """The recipe as plain values without credentials, to be printed, saved and sent."""
        content: dict[str, Any] = redact_all(self.model_dump(mode="json"))
        return content


def load_recipe(path: Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe, merge it over its `base:`, apply overrides, interpolate and validate.

    path: a file, or `vaescale:NAME` for one that comes with the package, such as vaescale:digits/optimal. Raises UserError
    with one sentence for the first fault.
    """
    path = _existing(path)
    for override in overrides or []:
        key, equals, _ = override.partition("=")
        if not equals or not re.fullmatch(r"\w+(\.\w+)*", key):
            raise UserError(f"override {override!r} is not key=value, such as optimizer.lr=1e-3")
    changes = f" with {' '.join(overrides)}" if overrides else ""
    return _validated(_read(path), lambda: _typed(overrides or []), path=path, described=f"{path}{changes}")


def recipe_of(content: Mapping[str, Any] | Path | str, changes: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of a nested mapping, or of a file as `load_recipe` reads it, with changes by Python values.

    A mapping may name a `base:` of the current folder or of the package. changes: sections, or single values by dotted keys:
    {"optimizer.lr": 1e-3, "training": {"steps": 100}}. Raises UserError with one sentence for the first fault.
    """
    nested: dict[str, Any] = {}
    for key, value in (changes or {}).items():
        *above, last = key.split(".")
        section = nested
        for part in above:
            section = section.setdefault(part, {})
        section[last] = {**section.get(last, {}), **value} if isinstance(value, Mapping) else value
    if isinstance(content, Mapping):
        path, loaded = Path("recipe"), _plain(content)
    else:
        path = _existing(Path(content))
        loaded = _read(path)
    return _validated(loaded, lambda: _plain(nested), path=path, described=str(path))


def _plain(value: Any) -> Any:
    """Values as YAML has them: paths are text, tuples lists, and numpy's numbers Python's."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if hasattr(value, "item") else value


def _validated(loaded: Any, changes: Callable[[], Any], *, path: Path, described: str) -> Recipe:
    """The recipe of what a file holds, merged over its base, with changes. path: for its base, and to be named."""
    import_installed()
    if isinstance(loaded, dict) and "base" in loaded:
        below = _read(_base_of(path, loaded.pop("base")))
        try:
            loaded = OmegaConf.to_container(_merged(below, loaded))
        except FAULTS as error:
            raise UserError(f"{path} does not merge with its base: {' '.join(str(error).split())}") from error
    try:
        typed = changes()
        given = _merged(loaded, typed) if isinstance(loaded, dict) else OmegaConf.create(loaded)
        default = {"run_dir": Recipe.model_fields["run_dir"].default} if "name" in given else {}
        content = OmegaConf.to_container(OmegaConf.merge(OmegaConf.create(default), given), resolve=True)
        _set_steps(content)
    except UserError:
        raise
    except FAULTS as error:
        raise UserError(f"{described} does not resolve: {' '.join(str(error).split())}") from error
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        if any(fault["type"] == "union_tag_invalid" for fault in error.errors()):
            origins.refuse_missing(path.parent)
        raise UserError(sentence(error, content, Recipe)) from error


def _set_steps(content: Any) -> None:
    """Give a recipe with training.epochs its training.steps, from the index of its training images. Raises UserError and DataError."""
    training, data = (
        (content.get(name) if isinstance(content, dict) else None) for name in ("training", "data")
    )
    if not isinstance(training, dict) or not isinstance(data, dict) or training.get("steps") is not None:
        return
    epochs, places, batch = (
        training.get("epochs"),
        _training_places(data.get("train")),
        data.get("global_batch"),
    )
    if epochs is None:
        return
    training["steps"] = 1  # what is wrong with the numbers is said when they are validated
    is_number = isinstance(epochs, int | float) and not isinstance(epochs, bool) and 0 < epochs < 1e9
    if is_number and places and isinstance(batch, int) and batch > 0:
        images = sum(open_index(place, cache=data.get("cache_dir")).num_samples for place in places)
        training["steps"] = steps_of(epochs, images // batch)


def _training_places(train: Any) -> list[str]:
    """The folders and URLs of the training sets that are read, in a recipe that is not validated yet; [] where they are not clear."""
    sets = train if isinstance(train, list) else [train]
    read = [one for one in sets if not (isinstance(one, dict) and one.get("weight") == 0)]
    places = [one.get("path") if isinstance(one, dict) else one for one in read]
    texts = [place for place in places if isinstance(place, str)]
    return texts if len(texts) == len(places) else []


def steps_of(epochs: float, steps_per_epoch: int) -> int:
    """The optimizer steps of a number of epochs, 1 at least."""
    return max(1, round(epochs * steps_per_epoch))


def _existing(path: Path) -> Path:
    """The file of a recipe. Raises UserError where there is none."""
    if str(path).startswith(PREFIX):
        path = shipped_file(str(path))
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(
            f"recipe {path} {what}; see `ls recipes/*/*.yaml`, or name one that comes with the package, such as "
            "vaescale:digits/optimal"
        )
    return path


def _typed(overrides: list[str]) -> Any:
    """Overrides as nested values: text where a key holds text, and decimal numbers. Raises UserError for another number."""
    meant = []
    for override in overrides:
        key, _, text = override.partition("=")
        try:
            quoted = as_meant(text, _holds_text, above=key.split("."))
        except AmbiguousNumberError as error:
            raise UserError(f"override {override} {_in_yaml(error)}") from error
        meant.append(f"{key}={quoted.strip()}")
    return OmegaConf.to_container(OmegaConf.from_dotlist(meant))


def _in_yaml(error: AmbiguousNumberError) -> str:
    return f"is {error.value} in YAML 1.1; write the number as {error.value}"


def _holds_text(key: Sequence[str]) -> bool:
    """Whether a recipe key holds text, in any kind of its section."""
    sections: list[type[BaseModel]] = [Recipe]
    for part in key[:-1]:
        sections = [kind for section in sections for kind in kinds_of(section, part)]
    fields = [section.model_fields.get(key[-1]) for section in sections]
    return any(
        field is not None and (field.annotation is str or str in get_args(field.annotation))
        for field in fields
    )


def _read(path: Path) -> Any:
    """Read a YAML file as plain values, with interpolations left unresolved."""
    try:
        text = as_meant(path.read_text(encoding="utf-8"), _holds_text)
        return OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
    except AmbiguousNumberError as error:
        raise UserError(f"{error.key}: {error.text} in {path} {_in_yaml(error)}") from error
    except FAULTS as error:
        raise UserError(f"{path} does not load: {' '.join(str(error).split())}") from error


def _base_of(path: Path, name: Any) -> Path:
    """The path of the recipe that `base: NAME` names: a file of the same folder, or one that comes with the package."""
    if isinstance(name, str) and name.startswith(PREFIX):
        base = shipped_file(name)
    else:
        base = path.parent / str(name)
        if not isinstance(name, str) or base.name != name or not base.is_file():
            raise UserError(
                f"base is {name!r} in {path}; name a file of the same folder, such as base.yaml, or one that comes with "
                "the package, such as vaescale:digits/base"
            )
    content = _read(base)
    if not isinstance(content, dict):
        raise UserError(f"base is {name!r} in {path}, which holds no keys; name a recipe")
    if "base" in content:
        raise UserError(
            f"base is {name!r} in {path}, which has a base itself; name {content['base']} instead"
        )
    return base


def _merged(below: dict[str, Any], above: Any) -> Any:
    """Merge one mapping over another; a section of another kind replaces the whole section below it."""
    for name, section in above.items():
        kinds = [value.get("kind") for value in (below.get(name), section) if isinstance(value, dict)]
        if len(kinds_of(Recipe, name)) > 1 and len(kinds) == 2 and None not in kinds and kinds[0] != kinds[1]:
            del below[name]
    return OmegaConf.merge(below, above)


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`key: old -> new` for each value that differs between two nested mappings."""
    lines = []
    for key in sorted(old.keys() | new.keys()):
        name, a, b = f"{prefix}{key}", old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{name}.")
        elif a != b:
            lines.append(f"{name}: {a} -> {b}")
    return lines
