"""Makes tests/toy_training.py importable, which several folders share."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
