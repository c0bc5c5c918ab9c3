"""Loader of the MLflow models that earlier versions exported, which name this module; `vaescale.commands.served` is the loader now."""

from vaescale.commands.served import _load_pyfunc

__all__ = ["_load_pyfunc"]
