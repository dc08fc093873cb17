"""Who has what: tensors spread over ranks, the largest first, each to the rank with the least so far. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping


def spread(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """The rank of each name; a pure function of the sizes, so all ranks agree without a word."""
    load = [0] * ranks
    owners = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = load.index(min(load))
        load[owners[name]] += sizes[name]
    return owners
