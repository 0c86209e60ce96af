"""Settings that hold for every test: no hub, one thread, a terminal of known width, no deadlines on a busy machine."""

import os
import signal

from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("COLUMNS", "120")
# Tests are many little programs: OpenMP threads that wait for one another cost far more than they bring.
os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("oriole", deadline=None)
settings.load_profile("oriole")
# A job that a script starts with & inherits a deaf ear for SIGINT, and so would every process that the tests interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
