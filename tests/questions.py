"""Examples in HellaSwag's format, of random words: as many as wanted, of every length."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

WORDS = [
    "the",
    "a",
    "man",
    "woman",
    "dog",
    "then",
    "slowly",
    "runs",
    "jumps",
    "over",
    "into",
    "river",
    "3,000",
    "café",
    "while",
    "holding",
    "up",
    "down",
    "again",
    "it's",
    "blue",
    "ladder",
]


def examples(count: int, seed: int = 0) -> list[dict[str, Any]]:
    source = random.Random(seed)

    def words(least: int, most: int) -> str:
        return " ".join(source.choices(WORDS, k=source.randint(least, most)))

    return [
        {
            "ind": number,
            "ctx": words(2, 40).capitalize() + ".",
            "endings": [words(1, 15) for _ in range(4)],
            "label": source.randrange(4),
        }
        for number in range(count)
    ]


def write(path: Path, count: int, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in examples(count, seed)))
    return path
