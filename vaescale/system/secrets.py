"""The removal of credentials from everything that is printed, saved or sent."""

import re
from typing import Any

HIDDEN = "***"
# A password may itself hold `/`, `:` and `@`: up to the last `@` before a space, a quote or the query.
_USER = re.compile(r"(?<=://)(?!/)[^\s'\"?#]+(?=@)")
_NAMES = r"[\w.%-]*(?:token|secret|password|passwd|signature|sig|credential|key)[\w.%-]*?|pwd|pass|auth|code"
_QUERY = re.compile(rf"(?i)((?:[?&;#]|%26|%3B)(?:{_NAMES})(?:=|%3D))(?:(?!%26|%3B)[^&;#\s'\"])+")


def redact(text: str) -> str:
    """Replace credentials in a text: `https://user:pass@host/x?token=abc` becomes `https://***@host/x?token=***`."""
    return _QUERY.sub(rf"\1{HIDDEN}", _USER.sub(HIDDEN, text))


def redact_all(value: Any) -> Any:
    """Replace credentials in every string of nested lists and mappings (see `redact`)."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, dict):
        return {key: redact_all(inner) for key, inner in value.items()}
    return [redact_all(inner) for inner in value] if isinstance(value, list) else value


def is_redacted(text: str) -> bool:
    """Whether credentials were removed from a text."""
    return any(sign + HIDDEN in text for sign in ("://", "=", "%3D", "%3d"))
