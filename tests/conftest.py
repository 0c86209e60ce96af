"""Settings that hold for every test: no hub, a terminal of known width, no deadlines (the machine may be busy)."""

import os

from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("COLUMNS", "120")
settings.register_profile("oriole", deadline=None)
settings.load_profile("oriole")
