"""`python -m vaescale VERB`: the same front door as `vaescale VERB`."""

import sys

from vaescale.cli import program

sys.exit(program())
