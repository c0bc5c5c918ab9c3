"""Variational autoencoders with calibrated decoders, from one laptop to many GPU nodes.

    import vaescale

    run = vaescale.train("vaescale:digits/optimal", run_dir="runs/first")   # or vaescale.load("runs/first")
    latents = run.encode(images)
    vaescale.evaluate(run)

The verbs are functions with their names on the command line, `-` written `_`. They, and torch with them, are imported when first used.
"""

import importlib
from typing import Any

__version__ = "0.2.0"

_COMMANDS = (
    *(
        "average",
        "baselines",
        "chaos",
        "compare_runs",
        "compress",
        "decompress",
        "doctor",
        "encode",
        "evaluate",
        "export",
        "fit_gmm",
        "fit_prior",
    ),
    *(
        "latents",
        "make_shards",
        "new_recipe",
        "quality",
        "quickstart",
        "sample",
        "score",
        "sweep",
        "sync",
        "train_features",
        "verify_shards",
    ),
)
_LAZY = {name: (f"vaescale.commands.{name}", name) for name in _COMMANDS} | {
    "Run": ("vaescale.commands.run", "Run"),
    "register": ("vaescale.commands.register", "register"),
    "register_metric": ("vaescale.commands.register", "register_metric"),
    "register_source": ("vaescale.commands.register", "register_source"),
    "load": ("vaescale.commands.run", "load"),
    "train": ("vaescale.commands.train_recipe", "train_recipe"),
    "import_autoencoder": ("vaescale.commands.import_autoencoder", "import_autoencoder"),
    "pictures": ("vaescale.data.given_images", "pictures"),
    "UserError": ("vaescale.errors", "UserError"),
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    """Import what is used, and keep it."""
    if name not in _LAZY:
        raise AttributeError(f"module 'vaescale' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    value = globals()[name] = getattr(importlib.import_module(module), attribute)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
