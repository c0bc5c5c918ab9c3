"""The first contact of processes with an MLflow database, one at a time.

MLflow makes the tables of a new database in several steps. A process that comes between them fails on tables that exist, or
takes the database for an outdated one. A lock file guards a SQLite file; in PostgreSQL the database itself has the lock,
because the processes may be on several machines.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from vaescale.system.files import exclusive

WAIT_SECONDS = 300.0  # for other processes that make the tables, some seconds each
REVISION_TABLE = "alembic_version"  # MLflow's migrations commit it together with the last table
ADVISORY_LOCK = 0x7661655363616C65  # "vaeScale" in ASCII, a key of 64 bits


@contextlib.contextmanager
def alone_with_file(path: Path) -> Iterator[None]:
    """Keep other processes from meeting a SQLite file within the block."""
    if path.is_file() and not os.access(path.parent, os.W_OK):  # a reader of other people's store
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock, waiting = (
        path.with_name(f".{path.name}.lock"),
        f"waiting for another process that opens {path} for the first time",
    )
    with exclusive(lock, wait_seconds=WAIT_SECONDS, waiting=waiting):
        yield


@contextlib.contextmanager
def alone_with_database(uri: str) -> Iterator[None]:
    """Keep other processes from meeting a PostgreSQL database without tables within the block; of another one do nothing.

    The lock ends with the transaction that holds it, also when this process is killed or its connection breaks. Raises what
    SQLAlchemy and the database's driver raise, after WAIT_SECONDS for a lock that somebody else still has.
    """
    if not uri.startswith("postgresql"):
        yield
        return
    from sqlalchemy import create_engine, inspect, text
    from sqlalchemy.pool import NullPool

    engine = create_engine(uri, poolclass=NullPool)
    if inspect(engine).has_table(REVISION_TABLE):
        yield
        return
    with engine.begin() as connection:
        connection.execute(text(f"SET LOCAL lock_timeout = '{WAIT_SECONDS:.0f}s'"))
        connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": ADVISORY_LOCK})
        yield
