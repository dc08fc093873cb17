"""Which parameter is what, by its name. Needs no torch."""

from __future__ import annotations

QKV = "attn.c_attn.weight"
"""Queries, keys and values: three matrices, one below the other."""


def is_inner_matrix(name: str) -> bool:
    """Whether it is a matrix inside a block."""
    return name.startswith("h.") and name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
