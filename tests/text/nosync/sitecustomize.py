"""Read by Python when it starts with this folder on PYTHONPATH: nothing waits for the disk. See ../conftest.py."""

import os

os.fsync = lambda fd: None
