"""Add a likelihood, network, posterior, objective, metric or source of your own, from your own module.

    import vaescale

    class CauchyConfig(LikelihoodConfig): ...

    vaescale.register(CauchyConfig)

Every verb knows it after `--import my_module`, in each process of a run. Imports no torch by itself.
"""

from collections.abc import Callable, MutableMapping
from typing import Any, Literal

from vaescale.config import Config
from vaescale.data.making.sources import SOURCES, Kind
from vaescale.data.making.sources.base import Source
from vaescale.errors import UserError
from vaescale.likelihoods.config import LIKELIHOODS, LikelihoodConfig
from vaescale.models.config import POSTERIORS, PosteriorConfig
from vaescale.networks.config import NETWORKS, NetworkConfig
from vaescale.objectives.config import OBJECTIVES, ObjectiveConfig

KINDS: dict[str, tuple[type[Config], MutableMapping[str, Any]]] = {
    "likelihood": (LikelihoodConfig, LIKELIHOODS),
    "network": (NetworkConfig, NETWORKS),
    "posterior": (PosteriorConfig, POSTERIORS),
    "objective": (ObjectiveConfig, OBJECTIVES),
}


def register(section: type[Config]) -> type[Config]:
    """Add a kind of a recipe section: a subclass of LikelihoodConfig, NetworkConfig, PosteriorConfig or ObjectiveConfig.

    The default of its field `kind` is its name in recipes, and `implementation` is what it configures: a class, or its full name. Returns the
    section, so that it can decorate the class. Raises UserError for another class, and for a name that is taken.
    """
    for name, (base, kinds) in KINDS.items():
        if isinstance(section, type) and issubclass(section, base):
            kind = section.model_fields["kind"].default
            if not isinstance(kind, str):
                raise UserError(
                    f"{section.__name__} has no name; give its field a default: kind: Literal['mine'] = 'mine'"
                )
            if section.implementation is None:
                raise UserError(f"{section.__name__} has no implementation; set implementation = YourClass")
            _add(kinds, kind, section, f"{name}.kind")
            return section
    bases = ", ".join(base.__name__ for base, _ in KINDS.values())
    raise UserError(f"{section!r} cannot be registered; give a subclass of {bases}")


def register_metric(
    name: str, function: Callable[[Any, Any], Any], protocol: str, *, more_is_better: bool = False
) -> None:
    """Add a metric of reconstructions to `evaluate` and what reads its results.

    function: images and reconstructions [B, C, H, W] in [0, 1] to values [B], whose mean is the metric. protocol: a sentence that is saved with
    the numbers. Raises UserError for a name that is taken.
    """
    from vaescale.evaluation.reconstruction import METRICS, Metric

    _add(METRICS, name, Metric(protocol, function, more_is_better=more_is_better), "metric")


def register_source(
    name: str,
    open_source: Callable[..., Source],
    *,
    takes: Literal["nothing", "path", "name"] = "path",
    options: tuple[str, ...] = (),
    needs: str = "the folder that holds the images",
) -> None:
    """Add a source of images to `make-shards NAME:...`.

    open_source: returns the Source. takes: what follows the name, its argument `path` or `name`. options: its other arguments, of `config`,
    `column`, `splits` and `classes_only`. needs: what is at the path, for messages. Raises UserError for a name that is taken.
    """
    _add(SOURCES, name, Kind(open_source, takes, options, needs), "source")


def _add(kinds: MutableMapping[str, Any], name: str, value: Any, what: str) -> None:
    """Add a value by name. The same again, of a module that was loaded again, takes the place of the one before."""
    if name in kinds and _place(kinds[name]) != _place(value):
        raise UserError(f"{what} {name!r} exists already, from {_place(kinds[name])[0]}; choose another name")
    kinds[name] = value


def _place(value: Any) -> tuple[str, str]:
    """The module and name of a class, or of the function of a metric or a source."""
    function = getattr(value, "of", None) or getattr(value, "open", None) or value
    return getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
