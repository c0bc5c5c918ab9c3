"""Print what vaescale depends on, one requirement a line: `requirements.py SETUP.py [EXTRA ...]`.

An image installs these before the package, so that a change of the source reuses that layer. setup.py is read, not run,
because the files that it needs are not there yet. `requirements.py SETUP.py --only EXTRA` prints the extra alone.
"""

import ast
import sys
from pathlib import Path
from typing import Any


def constants(path: Path) -> dict[str, Any]:
    """The literal values that a module assigns to names, by name."""
    values = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                values[node.targets[0].id] = ast.literal_eval(node.value)
            except ValueError:  # computed
                continue
    return values


def main() -> None:
    """Print DEPENDENCIES and the named EXTRAS of setup.py."""
    path, *words = sys.argv[1:]
    given = constants(Path(path))
    lines = [] if "--only" in words else list(given["DEPENDENCIES"])
    for name in words:
        lines += given["EXTRAS"][name] if name != "--only" else []
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
