"""Settings that hold for every test: no hub, two threads at most, and a terminal of known width."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("COLUMNS", "120")
