"""Requests to a served MLflow model that cannot be answered: refused by one sentence, with the status 400 of the scoring server."""

import logging
from collections.abc import Iterable

from vaescale.errors import UserError

LOGGER, UNKNOWN = "mlflow.models.utils", "Unrecognized params "


def refusal(message: str) -> Exception:
    """An error that MLflow's scoring server answers with status 400 and the message. In Python it is a UserError, too."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

    class Refused(MlflowException, UserError):  # type: ignore[misc]
        """A request that cannot be answered. The scoring server would put the whole request before the message: it stays as it is."""

        def __setattr__(self, name: str, value: object) -> None:
            if name != "message" or "message" not in vars(self):
                super().__setattr__(name, value)

    error: Exception = Refused(message, error_code=INVALID_PARAMETER_VALUE)  # type: ignore[call-arg]
    return error


def refuse_unknown_params(known: Iterable[str]) -> None:
    """Let MLflow refuse params that a model with these params does not have.

    MLflow 3.17 drops them with a warning in the server's log, before the model is called, and answers as if they were not there. The
    filter raises where that warning is about a model with exactly these params.
    """
    logger = logging.getLogger(LOGGER)
    if not any(isinstance(one, _RefuseUnknown) for one in logger.filters):
        logger.addFilter(_RefuseUnknown(known))


class _RefuseUnknown(logging.Filter):
    """A filter of MLflow's warning about dropped params."""

    def __init__(self, known: Iterable[str]) -> None:
        super().__init__()
        self._known = tuple(known)

    def filter(self, record: logging.LogRecord) -> bool:
        """Raise for the warning; pass every other record."""
        message = record.getMessage()
        if message.startswith(UNKNOWN) and all(repr(name) in message for name in self._known):
            names = message.removeprefix(UNKNOWN).partition("]")[0].strip("[").replace("'", "")
            raise refusal(f"unknown params {names}; known: {', '.join(self._known)}")
        return True
