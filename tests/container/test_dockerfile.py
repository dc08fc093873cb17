"""docker/Dockerfile: really built, and used as an engine would, without network and by anybody; and turned into a SIF."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from gpt2hpc import __version__
from gpt2hpc.run_dir import RunDir
from tests.container import parts
from tests.container.buildah import SECRET, Engine
from tests.container.image import Image
from tests.container.test_image import TINY, outcome

pytestmark = pytest.mark.timeout(1800)  # the first test builds the image
SOMEBODY = "54321:54322"  # who has no entry in the image's /etc/passwd
FEW = [*TINY, "--train.total_steps=8", "--train.device=cpu"]


def prepared(engine: Engine) -> str:
    """Tokens, as somebody makes them; the directory is theirs."""
    if not (engine.home / "data").exists():
        code, said = engine.run("prepare", "--source", "demo", "--out", "data", user=SOMEBODY)
        assert code == 0, said
    return "data"


def test_what_an_engine_reads(engine: Engine) -> None:
    config = engine.config
    assert (config["Entrypoint"], config["Cmd"]) == (["gpt2hpc"], ["--help"])
    assert config["User"] == "10001:10001"
    assert config["Labels"]["org.opencontainers.image.title"] == "gpt2hpc"
    assert config["Labels"]["org.opencontainers.image.licenses"] == "MIT"
    assert config["Labels"]["org.opencontainers.image.version"] == __version__
    assert config["Labels"]["org.opencontainers.image.revision"] == "0123abc"
    environment = dict(each.split("=", 1) for each in config["Env"])
    assert environment["PATH"].startswith("/opt/gpt2hpc/bin:")
    assert environment["PYTHONNOUSERSITE"] == "1"
    assert environment["NVIDIA_VISIBLE_DEVICES"] == "all"  # without it enroot's hook mounts no driver
    assert environment["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    free = ("NCCL_", "HF_", "OMP_", "TORCH", "TRITON", "CUDA_", "XDG_")
    assert not [name for name in environment if name.startswith(free)]


def test_its_entry_point(engine: Engine) -> None:
    assert engine.run("--version") == (0, f"gpt2hpc {__version__}")
    assert "prepare" in engine.run()[1]
    code, said = engine.run("nonsense")
    assert code == 2
    assert "gpt2hpc: error: " in said


def test_it_may_write_nothing(engine: Engine) -> None:
    assert engine.run("id", "-u", entrypoint=False) == (0, "10001")
    for user in (None, SOMEBODY):
        code, said = engine.run(
            "find", "/", "-xdev", "-path", "/opt/*", "-writable", "!", "-type", "l", user=user, entrypoint=False
        )
        assert (code, said) == (0, "") or "denied" in said
    assert engine.run("find", "/opt", "!", "-perm", "-o=r", "-print", entrypoint=False) == (0, "")


def test_it_trains_for_anybody(engine: Engine) -> None:
    """`docker run --user … --volume …:/work IMAGE train …`, and what comes out is theirs."""
    data = prepared(engine)
    code, said = engine.run("train", "--run-dir", "run", "--nproc", "2", "--data.dir", data, *FEW, user=SOMEBODY)
    assert code == 0, said
    run = RunDir(engine.home / "run")
    assert outcome(run) == ("finished", 8)
    assert run.finished.stat().st_uid == int(SOMEBODY.split(":")[0])


def test_it_tries_itself_as_anybody(engine: Engine) -> None:
    """With torch.compile, which needs the compiler and a place to write."""
    code, said = engine.run("selftest", "--cpu", user=SOMEBODY)
    assert code == 0, said
    assert "FAIL" not in said


def test_nothing_of_the_build_is_left(engine: Engine) -> None:
    """No secret, wheel or package list; and no file that two layers hold."""
    assert SECRET not in engine.store("inspect", "--type", "image", engine.image)
    with engine.store.mounted(engine.container) as root:
        found = subprocess.run(["grep", "-rlIF", SECRET, root], capture_output=True, text=True, check=False)
        assert (found.stdout, found.returncode) == ("", 1)
        for folder in ("checkout", "wheels", "var/lib/apt/lists", "root/.cache"):
            assert not [path for path in root.joinpath(folder).rglob("*") if path.is_file() and path.stat().st_size], (
                folder
            )
        apparent = int(
            subprocess.run(["du", "-sb", root], capture_output=True, text=True, check=True).stdout.split()[0]
        )
    assert engine.size_bytes < 1.1 * apparent


def test_a_sif_of_it(engine: Engine, engine_sif: Image) -> None:
    """`apptainer build gpt2hpc.sif docker-archive:…`: its entry point, labels and environment are those of the image."""
    assert engine_sif.run("run", "--version") == (0, f"gpt2hpc {__version__}")
    code, said = engine_sif.run("inspect")
    assert code == 0
    assert f"org.opencontainers.image.version: {__version__}" in said
    assert "org.opencontainers.image.revision: 0123abc" in said
    shown = "import os; print(os.environ.get('PYTHONPATH'), os.environ['PATH'].split(':')[0])"
    hostile = {"PYTHONPATH": "/nowhere", "PYTHONHOME": "/nowhere"}
    code, said = engine_sif.run("exec", "python3", "-c", shown, env=hostile)
    assert (code, said.split()[-1]) == (0, "/opt/gpt2hpc/bin"), said
    assert "nowhere" not in said
    code, said = engine_sif.run("run", "prepare", "--source", "demo", "--out", "data")
    assert code == 0, said
    code, said = engine_sif.run("run", "train", "--run-dir", "run", "--data.dir", "data", *FEW)
    assert code == 0, said
    assert outcome(RunDir(engine_sif.home / "run")) == ("finished", 8)


SCRIPT = ("sh", "/checkout/docker/install.sh")


def in_base(
    engine: Engine, container: str, *command: str, env: dict[str, str] | None = None, volumes: tuple[str, ...] = ()
) -> str:
    """What the command prints in a container of the base system, with the checkout; RuntimeError where it fails."""
    options = [f"--env={name}={value}" for name, value in (env or {}).items()]
    options += [f"--volume={each}" for each in (f"{parts.ROOT}:/checkout:ro", *volumes)]
    return engine.store("run", *options, container, "--", *command)


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"INSTALL_TORCH": "skip"}, "INSTALL_TORCH=skip, and BASE_IMAGE has no torch"),
        ({"INSTALL_TORCH": "yes"}, "INSTALL_TORCH=yes is neither auto nor skip"),
    ],
    ids=["skip without torch", "another word"],
)
def test_mistakes_in_arguments(engine: Engine, bare: str, variables: dict[str, str], complaint: str) -> None:
    with pytest.raises(RuntimeError, match=complaint):
        in_base(engine, bare, *SCRIPT, "torch", env=variables)


def test_a_base_with_its_own_torch_keeps_it(engine: Engine, bare: str) -> None:
    """As NVIDIA's images have it: among the system's packages, and with a constraint on every pip. torch is that of the image."""
    with engine.store.mounted(engine.container) as root:
        packages = next(root.glob("opt/gpt2hpc/lib/python3.*/site-packages"))
        brought = Path("/usr/local/lib", packages.parent.name, "dist-packages")
        volumes = (f"{packages}:{brought}:ro", f"{parts.wheels()}:/mnt:ro")
        env = {
            "INSTALL_TORCH": "skip",
            "PIP_CONSTRAINT": "/nowhere.txt",
            "PIP_OPTIONS": parts.arguments("")["PIP_OPTIONS"],
        }
        said = in_base(engine, bare, *SCRIPT, "torch", "packages", "project", env=env, volumes=volumes)
        assert "of the base is kept" in said
        python = "/opt/gpt2hpc/bin/python3"
        where = "import torch, gpt2hpc; print(torch.__file__, gpt2hpc.__file__)"
        torch, gpt2hpc = in_base(engine, bare, python, "-c", where, volumes=volumes).split()
    assert torch == f"{brought}/torch/__init__.py"
    assert gpt2hpc.startswith("/opt/gpt2hpc/lib/")
    assert in_base(engine, bare, "find", "/opt/gpt2hpc", "-name", "torch*.dist-info") == ""
