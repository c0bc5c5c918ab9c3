"""Print what vaescale depends on, one requirement a line: `requirements.py SETUP.py [EXTRA ...]`.

An image installs these before the package, so that a change of the source reuses that layer. `requirements.py SETUP.py
--only EXTRA` prints the extra alone.
"""

import runpy
import sys
from typing import Any

import setuptools


def main() -> None:
    """Run setup.py with a `setup` that prints instead of installing."""
    path, *extras = sys.argv[1:]
    alone = "--only" in extras
    names = [name for name in extras if name != "--only"]

    def show(**given: Any) -> None:
        lines = [] if alone else list(given["install_requires"])
        for name in names:
            lines += given["extras_require"][name]
        sys.stdout.write("\n".join(lines) + "\n")

    setuptools.setup = show
    runpy.run_path(path)


if __name__ == "__main__":
    main()
