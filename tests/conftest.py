"""Settings that hold for every test: no hub, one thread, a terminal of known width, no deadlines on a busy machine."""

import os

from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("COLUMNS", "120")
# Tests are many little programs: OpenMP threads that wait for one another cost far more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("oriole", deadline=None)
settings.load_profile("oriole")
