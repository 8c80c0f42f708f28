"""Records small cases for the tests that run without torch: `python -m tests.parity.record [NAME ...]`."""

import sys

from tests.parity.case import record
from tests.parity.cases import CASES

if __name__ == "__main__":
    for name in sys.argv[1:] or [name for name, case in CASES.items() if case.fixture]:
        path = record(name, CASES[name])
        print(f"{path.name}: {path.stat().st_size} bytes")
