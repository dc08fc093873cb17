"""`python -m gpt2hpc.trials MODULE DEVICE FOLDER GPUS`: one trial, whose outcome is the last line that is printed."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from gpt2hpc.errors import Gpt2hpcError
from gpt2hpc.trials.bench import Bench, TrialError
from gpt2hpc.trials.rounds import MARK


def main(argv: list[str]) -> int:
    module, device, folder, gpus = argv
    bench: Any = Bench("cuda" if device == "cuda" else "cpu", Path(folder), int(gpus))
    try:
        state, text = "OK", importlib.import_module(f"gpt2hpc.trials.{module}").run(bench)
    except Exception as error:  # whatever it is, it is what this trial is about
        state, text = "FAIL", _reason(error)
    print(MARK + json.dumps({"state": state, "text": text}), flush=True)
    return 0


def _reason(error: Exception) -> str:
    """In a line; of an error that nobody has foreseen its kind too."""
    if isinstance(error, Gpt2hpcError):
        return error.line
    said = " ".join(str(error).split())[:400]
    return said if isinstance(error, TrialError) else f"{type(error).__name__}: {said}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
