"""What a user can get wrong: one sentence with the value and the remedy, and the exit code that says whose it is."""


class UserError(ValueError):
    """A recipe or an argument that cannot work. The message names the value and the remedy."""

    exit_code = 2


class MissingPackage(UserError):
    """An optional package that is not installed. The message says how to install it."""


class DataError(UserError):
    """Data that is missing, damaged or unfit for the recipe."""

    exit_code = 3


class TrainingStopped(UserError):
    """Training cannot go on, for example because the loss is not finite."""

    exit_code = 4


class NotFinite(TrainingStopped):
    """Loss or gradient stay NaN or Inf."""


class Preempted(UserError):
    """Training was asked to stop and has saved all that it needs to go on: requeue it."""

    exit_code = 75
