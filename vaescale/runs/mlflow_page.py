"""The address of a run's page on an MLflow server. Imports no MLflow."""

from urllib.parse import quote, urlsplit, urlunsplit

from vaescale.system.secrets import redact


def page_of_run(uri: str, experiment_id: str, run_id: str) -> str:
    """The page of a run in the store at a tracking URI, or "" for a store that is no server (a file or a database).

    Credentials of the URI are left out: the address is for other people's browsers.
    """
    try:
        parts = urlsplit(redact(uri))  # a password may hold a slash, which would make it a part of the path
        host, port = parts.hostname, parts.port
    except ValueError:
        return ""
    if parts.scheme not in ("http", "https") or not host or not experiment_id or not run_id:
        return ""
    shown = f"[{host}]" if ":" in host else host
    place = shown if port is None else f"{shown}:{port}"
    run = f"/experiments/{quote(experiment_id, safe='')}/runs/{quote(run_id, safe='')}"
    return urlunsplit((parts.scheme, place, f"{parts.path.rstrip('/')}/", "", run))
