"""The fault of an image that cannot be used."""

REASONS = ("changed", "damaged", "format", "pixels", "depth", "transparency", "colour", "shape", "short")


class PictureFault(ValueError):
    """The fault of an image that cannot be used. reason: one of REASONS; the message is a sentence."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
