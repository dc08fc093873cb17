"""With this directory on PYTHONPATH every process reads documents at a pace that leaves time to act, and notes which units it begins.

KIT_DOCUMENT_PACE_S=0.02   each document takes that much longer, without using the CPU
KIT_BEGUN=DIR              a file a process there: unit and time, a line for each that it begins
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gpt2hpc.data import encode

PACE_S, BEGUN = float(os.environ["KIT_DOCUMENT_PACE_S"]), Path(os.environ["KIT_BEGUN"])
genuine = encode._documents


def _documents(plan: Any, unit: Any, locate: Any) -> Iterator[Any]:
    with (BEGUN / f"{os.getpid()}-{time.monotonic_ns()}").open("w") as file:
        file.write(f"{unit.index} {time.time()}\n")
    for document in genuine(plan, unit, locate):
        time.sleep(PACE_S)
        yield document


encode._documents = _documents
