"""What a rank meets: its Python, its GPU, and the network to the others."""

from __future__ import annotations

from gpt2hpc.checks import gpu, interpreter, network
from gpt2hpc.checks.scene import Scene
from gpt2hpc.finding import Finding


def look(scene: Scene) -> list[Finding]:
    """The Python that trains is asked once, for all three."""
    found = interpreter.probe(scene)
    return [*interpreter.look(scene, found), *gpu.look(scene, found), *network.look(scene, found)]
