"""The image as users have it: a real Apptainer, a real build, an unprivileged user, no network."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from gpt2hpc import __version__
from gpt2hpc.run_dir import RunDir
from tests.container.apptainer import TOKEN
from tests.container.image import Image, Process, finish

pytestmark = pytest.mark.timeout(1200)  # the first test builds the image

STEPS = 60
TINY = (
    "--preset=smoke --optimizer.warmup_tokens=1024 --model.n_layer=1 --model.n_head=2 --model.n_embd=16 --model.block_size=32 "
    f"--train.device=cpu --train.total_steps={STEPS} --train.tokens_per_step=256 --train.log_every=1 --train.eval_tokens=2048"
).split()


def wait_for_step(run: RunDir, step: int, *processes: Process) -> None:
    deadline = time.monotonic() + 240
    while not (run.log.exists() and f"\n{step} train" in run.log.read_text()):
        if time.monotonic() > deadline or any(process.poll() is not None for process in processes):
            pytest.fail(f"no step {step}: {[finish(process) for process in processes]}")
        time.sleep(0.05)


def outcome(run: RunDir) -> tuple[str, int]:
    facts = json.loads(run.outcome.read_text())
    return facts["cause"], facts["step"]


def test_version_and_help(image: Image) -> None:
    assert image.run("run", "--version") == (0, f"gpt2hpc {__version__}")
    assert image.run("exec", "gpt2hpc", "--version") == (0, f"gpt2hpc {__version__}")
    assert image.run("exec", "python3", "-m", "gpt2hpc", "--version") == (0, f"gpt2hpc {__version__}")
    code, said = image.run("run", "--help")
    assert code == 0
    assert "prepare" in said
    code, said = image.run("run-help")
    assert code == 0
    assert "apptainer run IMAGE" in said


def test_labels(image: Image) -> None:
    code, said = image.run("inspect")
    assert code == 0
    labels = dict(line.split(": ", 1) for line in said.splitlines() if ": " in line)
    assert labels["org.opencontainers.image.title"] == "gpt2hpc"
    assert labels["org.opencontainers.image.version"] == __version__
    assert labels["org.opencontainers.image.revision"] == "0123abc"
    assert labels["gpt2hpc.torch"].startswith("2.")


def test_no_secret_of_the_build_is_in_it(image: Image) -> None:
    """And what looks for one finds what is there."""
    places = ("/.singularity.d", "/opt", "/etc", "/root", "/usr/local", "/var")
    search = f"grep -rlIF -e %s {' '.join(places)} 2>/dev/null | head"
    assert image.run("exec", "sh", "-c", search % TOKEN) == (0, "")
    assert "/opt/gpt2hpc/" in image.run("exec", "sh", "-c", search % "include-system-site-packages")[1]
    assert TOKEN not in image.run("inspect", "--all")[1]


def test_its_own_test_passes(image: Image) -> None:
    code, said = image.run("test")
    assert code == 0, said
    assert "FAIL" not in said
    assert "this installation works here" in said


def test_no_network_no_privilege_no_slurm_and_read_only(image: Image) -> None:
    """Of the tests' own surroundings: what they prove, they prove under these."""
    look = "import os, socket; print(os.getuid() > 0, [name for _, name in socket.if_nameindex()])"
    assert image.run("exec", "python3", "-c", look) == (0, "True ['lo']")
    assert image.run("exec", "touch", "/opt/gpt2hpc/x")[0] != 0
    assert image.run("exec", "sh", "-c", "command -v scontrol srun sbatch")[0] != 0
    assert image.run("exec", "find", "/opt/gpt2hpc", "!", "-perm", "-o=r", "-print") == (0, "")


def test_the_hosts_python_packages_do_not_leak_in(image: Image) -> None:
    """Neither by ~/.local nor by PYTHONPATH, which environment modules set."""
    version = "import sys; print('python%d.%d' % sys.version_info[:2])"
    local = Path(image.home.parent, ".local", "lib", image.run("exec", "python3", "-c", version)[1], "site-packages")
    name = f"leak_{image.home.name.replace('-', '_')}"
    assert image.run("exec", "sh", "-c", f"mkdir -p {local}; touch {local}/{name}.py")[0] == 0
    code, said = image.run("exec", "python3", "-c", f"import {name}", env={"PYTHONPATH": str(local)})
    assert code == 1
    assert f"No module named '{name}'" in said
    told = {"APPTAINERENV_PYTHONPATH": str(local)}  # who means it can have it
    assert image.run("exec", "python3", "-c", f"import {name}", env=told) == (0, "")


def test_the_hosts_path_does_not_leak_in(image: Image) -> None:
    code, said = image.run("exec", "sh", "-c", "echo $PATH", env={"PATH": "/of-the-host:/usr/bin:/usr/sbin:/bin:/sbin"})
    assert code == 0
    assert said.startswith("/opt/gpt2hpc/bin:/usr/local/")
    assert "/of-the-host" not in said


def test_the_doctor_in_it_finds_nothing_missing(image: Image) -> None:
    """By that image's own Python; the site profile that names an image is the host's affair."""
    profile = image.home / "site.yaml"
    profile.write_text("image: /nowhere/gpt2hpc.sif\n")
    code, said = image.run("run", "doctor", "--site", profile.name)
    assert code == 0, said
    assert "in a container image on " in said
    for name in ("slurm", "image", "python of ranks", "torch", "packages", "tokenizer"):
        assert f"\nOK      {name}: " in said, said


@pytest.mark.parametrize(
    ("app", "arguments", "code"),
    [("doctor", [], 0), ("prepare", ["--source=demo", "--out=data"], 0), ("train", ["--data.dir=nowhere"], 4)],
    ids=["doctor", "prepare", "train"],
)
def test_its_apps(image: Image, data: Path, app: str, arguments: list[str], code: int) -> None:
    """`apptainer run --app NAME IMAGE …` is `apptainer run IMAGE NAME …`."""
    settings = ["--run-dir=refused", *TINY] if app == "train" else []
    assert image.run(f"run --app {app}", *settings, *arguments)[0] == code
    code, said = image.run(f"run --app {app}", "--help")
    assert code == 0
    assert said.startswith(f"usage: gpt2hpc {app} ")


def test_it_shows_what_would_be_submitted(image: Image) -> None:
    """Without Slurm, which only the host has."""
    code, said = image.run(
        "run", "submit", "--dry-run", "--nodes", "2", "--runtime", "apptainer", "--container", "/bin/sh"
    )
    assert code == 0, said
    assert "\n#SBATCH --nodes=2\n" in said
    assert "\nIMAGE=/bin/sh\n" in said


def test_torch_compiles_in_it(image: Image) -> None:
    program = "import torch; print(torch.compile(lambda x: torch.sin(x) + x)(torch.zeros(8)).sum().item())"
    code, said = image.run("exec", "python3", "-c", program, env={"TORCHINDUCTOR_CACHE_DIR": f"{image.home}/inductor"})
    assert (code, said.splitlines()[-1]) == (0, "0.0"), said


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["nonsense"], 2), (["train", "--train.tokens_per_step=1000"], 3), (["train", "--data.dir=nowhere"], 4)],
    ids=["usage", "config", "data"],
)
def test_exit_codes_pass_through(image: Image, data: Path, arguments: list[str], code: int) -> None:
    settings = ["--run-dir=refused", *TINY, f"--data.dir={data}"] if arguments[0] == "train" else []
    given = [arguments[0], *settings, *arguments[1:]]
    found, said = image.run("run", *given)
    assert found == code, said
    assert "gpt2hpc: error: " in said
    assert not arguments[1:] or arguments[1].removeprefix("--").split("=")[0] in said


def test_two_processes_are_preempted_and_go_on(image: Image, data: Path) -> None:
    run = RunDir(image.home / "preempted")
    command: list[str | Path] = ["train", "--run-dir", run.path, "--nproc", "2", "--data.dir", data, *TINY]
    process = image.start("run", *command)
    wait_for_step(run, 5, process)
    process.send_signal(signal.SIGTERM)
    code, said = finish(process)
    assert code == 6, said
    cause, step = outcome(run)
    assert cause == "preempted"
    assert 5 <= step < STEPS
    code, said = image.run("run", *command)
    assert code == 0, said
    assert f"resuming at step {step}" in said
    assert outcome(run) == ("finished", STEPS)
    assert run.finished.exists()
