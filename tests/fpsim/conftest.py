"""Lets the tests of this folder import their shared module: ``from judge import ...``."""

import sys
from pathlib import Path

if (here := str(Path(__file__).parent)) not in sys.path:
    sys.path.append(here)
