"""The batch scripts as text: templates with today's blocks, the dry run, sites; all without a Slurm."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2hpc import __version__, plan, prepare_array, train_job
from gpt2hpc.checks import asked
from gpt2hpc.checks.scene import Scene
from gpt2hpc.cluster import batch, inventory, script, site_profile
from gpt2hpc.cluster.dist_env import DistEnv
from gpt2hpc.cluster.inventory import Partition
from gpt2hpc.cluster.slurm import minutes, seconds
from gpt2hpc.config import CheckpointConfig, Config
from gpt2hpc.errors import EXIT_CODES, ConfigError, UsageError
from tests.tiny import gpt2hpc

ROOT = Path(__file__).parents[2]
TEMPLATES = sorted((ROOT / "slurm").glob("*.sbatch"))
TRAINING = [path for path in TEMPLATES if path.stem.startswith("train_")]
PREPARE, EVALUATE = ROOT / "slurm" / "prepare_array.sbatch", ROOT / "slurm" / "evaluate.sbatch"


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_a_template_holds_todays_blocks(path: Path) -> None:
    assert script.refreshed(path.read_text(), path) == path.read_text(), (
        "run: python -m gpt2hpc.cluster.script slurm/*.sbatch"
    )


def test_a_job_ends_with_any_documented_code() -> None:
    """Others mean something to Slurm; those of the table are passed on."""
    for block in ("tear-down", "prepare tear-down", "evaluate tear-down"):
        assert re.findall(r" -le (\d+) \] \|\| \w+=1", "\n".join(script.lines(block))) == [str(max(EXIT_CODES))]


def test_templates_differ_in_size_only() -> None:
    def blurred(path: Path) -> str:
        size = path.stem.removeprefix("train_")
        text = path.read_text().replace(size, "SIZE")
        return re.sub(r"(?m)^# Train GPT-2 .*|^#SBATCH --nodes=\d+$", "", text)

    assert len({blurred(path) for path in TRAINING}) == 1
    assert {f"gpt2-{path.stem.removeprefix('train_')}" for path in TRAINING} == {
        path.stem for path in (ROOT / "gpt2hpc" / "presets").glob("gpt2-*.yaml")
    }


@pytest.mark.parametrize(
    ("path", "block"), [(TRAINING[0], "tear-down"), (PREPARE, "prepare tear-down"), (EVALUATE, "evaluate tear-down")]
)
def test_a_template_without_a_block_is_refused(path: Path, block: str, tmp_path: Path) -> None:
    text = path.read_text().replace(f"# >>> gpt2hpc {block} >>>", "")
    with pytest.raises(ConfigError, match=block):
        script.refreshed(text, tmp_path)


@pytest.mark.parametrize("path", [TRAINING[0], PREPARE, EVALUATE], ids=lambda path: path.name)
def test_the_variables_that_a_template_explains_are_those_it_reads(path: Path) -> None:
    text = path.read_text()
    header, body = text.split("\n#SBATCH", 1)
    explained = set(re.findall(r"(?m)^#   ([A-Z_]+)  +", header))
    read = set(re.findall(r"(?m)^([A-Z_]+)=\$\{\1:?-", body))
    assert explained == read
    for name in ("RUNTIME", "BINDS"):
        assert name in header
        assert name in body


def shellcheck(text: str, tmp_path: Path) -> str:
    program = shutil.which("shellcheck")
    if program is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("shellcheck is not installed")
    path = tmp_path / "script.sh"
    path.write_text(text)
    return subprocess.run([program, path], capture_output=True, text=True, check=False).stdout


@pytest.mark.parametrize("path", [*TEMPLATES, ROOT / "docker" / "install.sh"], ids=lambda path: path.name)
def test_scripts_pass_shellcheck(path: Path, tmp_path: Path) -> None:
    assert shellcheck(path.read_text(), tmp_path) == ""


WITHOUT_SLURM_AND_TORCH = (
    "import sys, os; os.environ['PATH'] = '/nowhere'; sys.modules['torch'] = None; "
    "from gpt2hpc.__main__ import console; sys.exit(console())"
)


def dry_run(*words: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_SLURM_AND_TORCH, "submit", *words, "--dry-run"]
    environment = {**os.environ, "HOME": str(cwd), **(env or {})}
    environment.pop("XDG_CONFIG_HOME", None)
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


def test_the_dry_run_is_a_script_that_passes_shellcheck(tmp_path: Path) -> None:
    """And needs neither Slurm nor torch."""
    profile = tmp_path / ".config" / "gpt2hpc" / "site.yaml"
    profile.parent.mkdir(parents=True)
    (tmp_path / "kit.sif").touch()
    profile.write_text(
        "account: p1\npartition: cpu\nimage: kit.sif\nbinds: [/scratch]\nenvironment: {NCCL_SOCKET_IFNAME: hsn, A: it's}\n"
        "setup: [module load apptainer || true]\nmaster_addr_suffix: i\ngpu_directive: gres\nsbatch: {mail-type: END}\n"
    )
    done = dry_run("--nodes", "4", "--gpus-per-node", "4", "--partition", "gpu", "--time", "1-12", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert shellcheck(done.stdout, tmp_path) == ""
    directives = set(re.findall(r"(?m)^#SBATCH --(.*)$", done.stdout))
    assert {
        "nodes=4",
        "ntasks-per-node=4",
        "gres=gpu:4",
        "account=p1",
        "partition=gpu",
        "time=2160",
        "requeue",
        "open-mode=append",
        "signal=USR2@60",
        "mail-type=END",
    } <= directives
    for line in ("partition = gpu (flag)", "account = p1 (site)", "nproc = 4 (default)", "nodes = 4 (flag)"):
        assert f"# {line}\n" in done.stdout
    assert "export APPTAINERENV_A='it'\"'\"'s'" in done.stdout
    assert f"export GPT2HPC_SUBMITTED_VERSION={__version__} #" in done.stdout
    assert "MASTER_ADDR_SUFFIX=i" in done.stdout
    assert "BINDS=/scratch\n" in done.stdout
    assert f"DATA={tmp_path}/data/demo\n" in done.stdout
    assert done.stdout.index("module load") < done.stdout.index(">>> gpt2hpc set-up")
    assert not (tmp_path / "runs").exists()
    for block in ("set-up", "tear-down"):
        assert "\n".join(script.lines(block)) in done.stdout


@pytest.mark.parametrize("cluster", ["local", "debug"])
def test_a_dry_run_here_starts_nothing(cluster: str, tmp_path: Path) -> None:
    done = dry_run("--cluster", cluster, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "# a start would be refused: data.dir=data/demo holds no manifest.json" in done.stdout
    assert "warning: a start would be refused: data.dir=data/demo holds no manifest.json" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("count", "allotted"), [("", False), ("0", False), ("2", True)])
def test_gpus_allotted(count: str, allotted: bool) -> None:
    assert DistEnv.from_env({"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": count}).gpus_allotted is allotted


def test_the_script_and_the_templates_share_blocks_and_srun_arguments(tmp_path: Path) -> None:
    text = dry_run("--nodes", "2", "--gpus-per-node", "8", cwd=tmp_path).stdout
    template = TRAINING[0].read_text()
    for block in ("set-up", "tear-down"):
        assert "\n".join(script.lines(block)) in text
        assert "\n".join(script.lines(block)) in template
    for argument in script.SRUN_ARGS:
        assert re.search(rf"(?m)^srun .*{argument}", text)
        assert argument in template


def test_the_dry_run_of_an_array_is_a_script_that_passes_shellcheck(tmp_path: Path) -> None:
    """And shares its blocks with the template; it needs neither Slurm nor torch."""
    (tmp_path / "site.yaml").write_text(
        "partition: cpu\naccount: p1\nimage: kit.sif\nbinds: [/scratch]\nsbatch: {mail-type: END}\n"
    )
    (tmp_path / "kit.sif").touch()
    (tmp_path / "a.txt").write_text("text\n" * 10)
    words = [
        "--source",
        "a.txt",
        "--out",
        "out",
        "--array",
        "64",
        "--time",
        "90",
        "--site",
        "site.yaml",
        "--qos",
        "long",
    ]
    program = [sys.executable, "-c", WITHOUT_SLURM_AND_TORCH, "submit", "prepare", "--dry-run", *words]
    done = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    shown = done.stdout[done.stdout.index("#!/bin/bash") :]
    assert shellcheck(shown, tmp_path) == ""
    directives = set(re.findall(r"(?m)^#SBATCH --(.*)$", shown))
    assert {
        "partition=cpu",
        "account=p1",
        "qos=long",
        "time=90",
        "cpus-per-task=4",
        "requeue",
        "mail-type=END",
    } <= directives
    assert f"BINDS=/scratch,{tmp_path}/a.txt\n" in shown
    for line in ("qos = long (flag)", "account = p1 (site)", "cpus-per-task = 4 (default)", "container = "):
        assert f"# {line}" in shown
    template = PREPARE.read_text()
    for block in ("prepare set-up", "prepare tear-down"):
        assert "\n".join(script.lines(block)) in shown
        assert "\n".join(script.lines(block)) in template
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--nodes", "0"], 2, "--nodes=0 must be 1 or more"),
        (["--nodes", "2", "--gpus-per-node", "2", "--nproc", "3"], 2, "--nproc=3 is more than --gpus-per-node=2"),
        (["--cluster", "slurm", "--time", "inf"], 2, "--time=inf is not a time"),
        (["--cluster", "slurm", "--time", "soon"], 2, "--time=soon is not a time"),
        (
            ["--cluster", "slurm", "--time", "1"],
            2,
            "--time=1 is 1 min and must be above checkpoint.stop_margin_s=60",
        ),
        (["--site", "gone.yaml"], 3, "--site=gone.yaml is not a file"),
        (["--nodes", "2", "--container", "gone.sif"], 3, "gone.sif does not exist"),
        (["--cluster", "local", "--nodes", "2"], 2, "--nodes=2 needs a Slurm cluster"),
        (["--cluster", "local", "--partition", "gpu"], 2, "--partition=gpu needs a Slurm cluster"),
        (["--cluster", "local", "--guard"], 2, "--guard needs a Slurm cluster"),
    ],
)
def test_bad_options(words: list[str], code: int, told: str, tmp_path: Path) -> None:
    if "--site" in words:
        words = ["--nodes", "2", *words]
    done = dry_run(*words, cwd=tmp_path)
    assert (done.returncode, told in done.stderr) == (code, True), done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_without_slurm_nothing_is_submitted(data: Path, tmp_path: Path) -> None:
    words = [
        "--cluster",
        "slurm",
        "--nodes",
        "2",
        "--data.dir",
        str(data),
        "--run-dir",
        str(tmp_path / "run"),
        "--device",
        "cpu",
    ]
    shape = [
        "--model.block_size=16",
        "--train.tokens_per_step=256",
        "--train.micro_batch_size=2",
        "--train.total_steps=10",
    ]
    done = gpt2hpc(
        "submit", *words, *shape, "--optimizer.warmup_tokens=256", "--train.eval_tokens=512", env={"PATH": "/nowhere"}
    )
    assert done.returncode == 8, done.stderr
    assert "sbatch is not on PATH" in done.stderr


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 90),
        ("90:30", 91),
        ("1:30:00", 90),
        ("1-12", 2160),
        ("1-12:30", 2190),
        ("2-00:00:01", 2881),
        ("0:30", 1),
        ("0.5", 1),
        ("1.", 1),
    ],
)
def test_times_are_read_as_sbatch_reads_them(text: str, expected: int) -> None:
    assert minutes(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("90", 90), ("0.5", 0.5), (".25", 0.25), ("0:30", 0.5), ("1-0:00:15", 1440.25)]
)
def test_times_of_a_local_run_are_exact(text: str, expected: float) -> None:
    assert train_job.time_limit_min(text, Config(checkpoint=CheckpointConfig(stop_margin_s=0))) == expected


def test_every_verb_reads_the_same_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a minute too, which Slurm itself is not asked for."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    words = ["--source", "demo", "--out", str(tmp_path / "out"), "--cluster", "slurm", "--time", "0.5"]
    assert prepare_array.array_job(prepare_array.parsed(words))[0].minutes == 1
    with pytest.raises(UsageError, match="--time is 60 s, of which a start takes 180 s"):
        plan.main(["--time", "0.5"])
    scene, tried = Scene({}, asked={"time": "0.5"}), list[object]()
    monkeypatch.setattr(asked.inventory, "refusal", lambda options: tried.append(options["time"]))
    assert asked._limit("main", {"MaxTime": "00:30:00"}, scene).state == asked._trial(scene).state == "OK"
    assert tried == [1]


@pytest.mark.parametrize("text", ["", "soon", "1:2:3:4", "-5", "1-", "1.5h", ".", "1.5:00", "inf", "nan"])
def test_times_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--time="):
        minutes(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30", 30),
        ("30 sec", 30),
        ("00:01:30", 90),
        ("1:30", 90),
        ("2-01:00:00", 176_400),
        ("UNLIMITED", None),
        ("", None),
    ],
)
def test_times_as_slurm_prints_them(text: str, expected: int | None) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("partiton: gpu", "unknown key partiton; did you mean partition?"),
        ("gpus_per_node: four", "gpus_per_node='four' is not valid; it takes a whole number"),
        ("gpu_directive: gpus", "it takes one of gpus-per-node, gres"),
        ("runtime: kvm", "it takes one of apptainer, singularity, pyxis, docker, none"),
        ("environment: [A]", "it takes names with values"),
        ("binds: [{a: b}]", "it takes a list of texts"),
        ("partition: [a, b]", "it takes a text"),
        ("sbatch: {open-mode: truncate}", "drop open-mode"),
        ("sbatch: {no_requeue: true}", "drop no_requeue"),
        ("environment: {BAR BAZ: 1}", "'BAR BAZ' is none"),
        ("srun: {kill-on-bad-exit: 0}", "drop kill-on-bad-exit"),
        ("offline: maybe", "offline='maybe' is not valid; it takes true or false"),
        ("purged: {/scratch: soon}", "'soon' is no number of days"),
        ("purged: {scratch: 30}", "'scratch' is not absolute"),
        ("min_allreduce_gb_s: fast", "it takes a number of GB/s, such as 20"),
        ("- partition", "holds no settings"),
        ("a: [", ", line 1: expected the node content"),
    ],
)
def test_a_wrong_site_profile(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        site_profile.load(path)
    assert told in caught.value.line
    assert str(path) in caught.value.line


def test_which_site_profile_is_taken(tmp_path: Path) -> None:
    own = tmp_path / ".config" / "gpt2hpc" / "site.yaml"
    own.parent.mkdir(parents=True)
    paths = {"own": own, "variable": tmp_path / "v.yaml", "option": tmp_path / "o.yaml"}
    for name, path in paths.items():
        path.write_text(f"partition: {name}\n")
    env = {"HOME": str(tmp_path)}
    assert site_profile.find(None, {"HOME": str(tmp_path / "empty")}) == site_profile.Site()
    assert site_profile.find(None, env).partition == "own"
    env[site_profile.VARIABLE] = str(paths["variable"])
    assert site_profile.find(None, env).partition == "variable"
    assert site_profile.find(str(paths["option"]), env).partition == "option"


def test_a_path_in_a_profile_may_name_a_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    path = tmp_path / "site.yaml"
    path.write_text(
        "image: $SCRATCH/kit.sif\nbinds: $SCRATCH\ngpus_per_node: 4\ntime: 24:00:00\n"
        "environment: {A: true, B: 1:30:00, HF_HOME: $SCRATCH/hf, C: $NOT_SET_HERE/c}\n"
    )
    loaded = site_profile.load(path)
    assert (loaded.image, loaded.binds, loaded.gpus_per_node) == ("/scratch/me/kit.sif", ("/scratch/me",), 4)
    assert loaded.time == "24:00:00"
    assert loaded.environment == {"A": "true", "B": "1:30:00", "HF_HOME": "/scratch/me/hf", "C": "$NOT_SET_HERE/c"}


def test_what_is_read_beside_the_data_is_seen_in_a_container(tmp_path: Path) -> None:
    (tmp_path / "hellaswag.jsonl").touch()
    (tmp_path / "kit.sif").touch()
    (tmp_path / "site.yaml").write_text("image: kit.sif\n")
    words = ["--cluster", "slurm", "--site", "site.yaml", "--train.hellaswag", "hellaswag.jsonl", "--dry-run"]
    done = gpt2hpc("submit", *words, cwd=tmp_path)
    assert re.search(rf"(?m)^BINDS='?{tmp_path}/hellaswag\.jsonl'?$", done.stdout), done.stdout + done.stderr


def test_words_of_sbatch_are_passed_on() -> None:
    report = (
        "Command failed\nsbatch: error: invalid partition specified: x\nsbatch: error: Batch job submission failed\n"
    )
    assert batch._words(report) == "invalid partition specified: x; Batch job submission failed"


def test_the_dry_run_of_a_pipeline_is_four_scripts_that_pass_shellcheck(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("A text.")
    (tmp_path / "kit.sif").touch()
    (tmp_path / "site.yaml").write_text("account: p1\npartition: gpu\nimage: kit.sif\ncpus_per_task: 7\n")
    words = [
        "--source",
        "texts",
        "--data.dir",
        "data",
        "--run-dir",
        "run",
        "--gpus-per-node",
        "4",
        "--site",
        "site.yaml",
    ]
    words += ["--prepare", "--partition cpu --array 8", "--export", "--push me/mine"]
    program = [sys.executable, "-c", WITHOUT_SLURM_AND_TORCH, "submit", "pipeline", "--dry-run", *words]
    done = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    scripts = re.split(r"(?m)^# ==== \d of 4: (\w+).*\n", done.stdout)
    found = dict(zip(scripts[1::2], scripts[2::2], strict=True))
    assert list(found) == ["prepare", "train", "evaluate", "export"]
    for text in found.values():
        assert shellcheck(text, tmp_path) == ""
        assert "#SBATCH --account=p1" in text
        assert f"IMAGE={tmp_path}/kit.sif" in text
        assert f"export GPT2HPC_SUBMITTED_VERSION={__version__} #" in text
    partitions = [re.findall(r"#SBATCH --partition=(.*)", text) for text in found.values()]
    assert partitions == [["cpu"], ["gpu"], ["gpu"], ["gpu"]]
    gpus = [re.findall(r"#SBATCH --gpus-per-node=(.*)", text) for text in found.values()]
    assert gpus == [[], ["4"], ["4"], ["1"]]
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--source", "x", "--data.dir", "hf://datasets/me/mine"], "is prepared already"),
        (["--cluster", "local"], "a pipeline is jobs of Slurm"),
        (["--nodes", "0"], "--nodes=0 must be 1 or more"),
    ],
)
def test_a_pipeline_that_cannot_be(words: list[str], said: str, tmp_path: Path) -> None:
    done = gpt2hpc(
        "submit",
        "pipeline",
        "--dry-run",
        *(["--cluster", "slurm"] if "--cluster" not in words else []),
        *words,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--source", "texts/"], "--source=texts/ does not exist"),
        ([], "--out=data holds no plan yet; give a --source"),
    ],
    ids=["no such text", "no text"],
)
def test_a_dry_run_of_a_pipeline_that_would_be_refused_says_so(words: list[str], said: str, tmp_path: Path) -> None:
    done = dry_run("pipeline", "--data.dir", "data", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"warning: a start would be refused: {said}" in done.stderr
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    ("words", "minutes"),
    [
        ([], [30, 120, 30]),
        (["--time", "20"], [20, 20, 20]),
        (["--time", "1-0", "--evaluate", "--time 4:00:00 --hellaswag none", "--export", "--time 5"], [1440, 240, 5]),
    ],
    ids=["no limit", "a short one", "one for each"],
)
def test_what_comes_after_a_training_has_a_limit_that_the_partition_takes(
    words: list[str], minutes: list[int], tmp_path: Path
) -> None:
    done = dry_run(
        "pipeline", "--source", "texts/", "--data.dir", "data", "--prepare", "--time 30", *words, cwd=tmp_path
    )
    limits = [int(limit) for limit in re.findall(r"(?m)^#SBATCH --time=(\d+)", done.stdout)]
    assert limits == [30, *(minutes if words else minutes[1:])]
    assert "'--time'" not in done.stdout


def test_a_limit_that_is_no_time_is_told_with_its_option(tmp_path: Path) -> None:
    done = dry_run("pipeline", "--source", "texts/", "--data.dir", "data", "--evaluate", "--time soon", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("gpt2hpc: error: --evaluate: --time=soon is not a time; ")


def test_what_is_kept_to_submit_again_drops_what_was_that_jobs_alone() -> None:
    """Else a task of an array would begin the whole array again, and a job of a pipeline wait for one that is gone."""
    (rule,) = re.findall(r"sed -i -E '([^']+)'", script.text_of("set-up"))
    lines = {
        "#SBATCH --array=0-3": None,
        "#SBATCH -a 0-3": None,
        "#SBATCH -a0-3 --nodes=2": "#SBATCH --nodes=2",
        "#SBATCH --nodes=1 --array 0-3 --gres=gpu:8": "#SBATCH --nodes=1 --gres=gpu:8",
        "#SBATCH --dependency=afterok:7": None,
        "#SBATCH -d afterok:7 -H --kill-on-invalid-dep=yes -t 9": "#SBATCH -t 9",
        "#SBATCH --hold": None,
        **dict.fromkeys(
            (
                "#SBATCH --account=a",
                "#SBATCH --hint=nomultithread",
                "#SBATCH -A a",
                '#SBATCH --comment="as -a was"',
                "#SBATCH --nodes=2",
                "echo --array 0-3 --hold",
            ),
            "",
        ),
    }
    done = subprocess.run(["sed", "-E", rule], input="\n".join(lines), capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [kept or line for line, kept in lines.items() if kept is not None]


@pytest.mark.parametrize(
    ("feature", "count"),
    [("", 5), ("a100", 3), ("ib", 2), ("h100", 2), ("h10", 0), ("a100&ib", 5), ("[a100|h100]", 5)],
)
def test_nodes_that_a_job_can_use_beside_those_that_are_left_out(feature: str, count: int) -> None:
    """By sinfo's `%N %T %f`, a row for each partition of a node. Those that are powered down, or planned for another job, count."""
    (usable,) = re.findall(r"(?ms)^usable\(\) \{.*?^\}", script.text_of("set-up"))
    rows = [
        *(
            "n1 idle a100,ib",
            "n1 idle a100,ib",
            "n2 mixed a100,ib",
            "n3 idle~ a100",
            "n4 planned h100",
            "n5 idle% h100",
        ),
        *("out1 idle a100", "n6 down* a100", "n7 drained a100", "n8 draining a100", "n9 maint a100", "n10 idle* a100"),
        *("n11 reserved a100", "n12 failing a100"),
    ]
    command = ["bash", "-c", f"{usable}\nusable ' out1 out2 ' '{feature}'"]
    done = subprocess.run(command, input="\n".join(rows), capture_output=True, text=True, check=True)
    assert done.stdout == f"{count}\n"


def test_what_is_around_submit_does_not_change_the_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables of a job that `submit` is called in, and those of sbatch's that win over what is written in a script."""
    around = {
        "SLURM_MEM_PER_NODE": "100",
        "SLURM_JOB_ID": "7",
        "SLURMD_NODENAME": "n1",
        "SBATCH_PARTITION": "other",
        "SBATCH_TIMELIMIT": "1",
        "SBATCH_ARRAY_INX": "0-3",
        "SBATCH_SIGNAL": "9",
    }
    kept = {
        "SLURM_CONF": "/etc/slurm.conf",
        "SLURM_CLUSTERS": "a",
        "SBATCH_QOS": "long",
        "SBATCH_NO_REQUEUE": "1",
        "OMP_NUM_THREADS": "4",
    }
    for name, value in {**around, **kept}.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    asked = {"partition": "gpu", "time": 30, "qos": None, "additional_parameters": {"requeue": True}}
    with batch.as_from_a_login_shell(asked):
        assert not around.keys() & os.environ.keys()
        assert kept.items() <= os.environ.items()
    assert dict(os.environ) == before
    with batch.as_from_a_login_shell({"time": None}):
        assert (os.environ["SBATCH_TIMELIMIT"], os.environ["SBATCH_PARTITION"]) == ("1", "other")


@pytest.mark.parametrize(
    ("partition", "gpus"), [(None, 0), ("gpu1", 4), ("gpu1,gpu2", 2), ("cpu,gpu1", 4), ("cpu", 0), ("none", 0)]
)
def test_gpus_are_those_of_the_partitions_that_are_named(
    partition: str | None, gpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [("cpu", 0), ("gpu1", 2), ("gpu1", 4), ("gpu2", 2)]
    found = [
        Partition(
            name=name, is_default=name == "cpu", time_limit="1:00:00", nodes=1, cpus=8, gpus=count, gres="", features=""
        )
        for name, count in rows
    ]
    monkeypatch.setattr(inventory, "partitions", lambda: found)
    assert inventory.gpus_of(partition) == gpus
