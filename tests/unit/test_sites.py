"""Site profiles: the examples in the package, what follows from each key, and dry runs that tell whence each value is."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from gpt2hpc.cluster import job_environment, script, site_profile, site_warnings
from gpt2hpc.cluster.site_profile import Site
from gpt2hpc.errors import ConfigError
from tests.unit.test_slurm_scripts import dry_run, shellcheck

SHIPPED = site_profile.shipped()


def uncommented(text: str) -> str:
    """An example with all that it proposes: `# key: value` without the mark."""
    keys = "|".join(Site.__dataclass_fields__)
    return re.sub(rf"(?m)^# ((?:{keys}): )", r"\1", text)


def test_examples_are_shipped() -> None:
    assert set(SHIPPED) == {"plain", "slingshot", "infiniband", "pyxis"}


@pytest.mark.parametrize("name", SHIPPED)
def test_an_example_is_a_profile_as_it_is_and_with_all_that_it_proposes(name: str, tmp_path: Path) -> None:
    assert site_profile.load(SHIPPED[name]).account is None, "an example has no account of anybody's"
    path = tmp_path / "site.yaml"
    path.write_text(uncommented(SHIPPED[name].read_text()))
    whole = site_profile.load(path)
    assert whole.account == "proj42"
    assert whole.image
    assert whole.time


@pytest.mark.parametrize("name", SHIPPED)
def test_a_dry_run_takes_an_example_by_its_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "kit.sqsh").touch()
    done = dry_run("--nodes", "2", "--gpus-per-node", "4", "--site", name, "--container", "kit.sqsh", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"# site = {SHIPPED[name]} (flag)\n" in done.stdout
    assert shellcheck(done.stdout, tmp_path) == ""


def test_a_file_wins_over_an_example_and_another_name_lists_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert site_profile.find("plain", {}).path == SHIPPED["plain"]
    Path("plain").write_text("partition: mine")
    assert site_profile.find("plain", {}).partition == "mine"
    with pytest.raises(ConfigError) as caught:
        site_profile.find("slingshott", {})
    assert "did you mean slingshot?" in caught.value.line
    assert ", ".join(SHIPPED) in caught.value.line


def test_what_a_profile_makes_of_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text("offline: true\nmin_allreduce_gb_s: 20\nenvironment: {HF_HUB_OFFLINE: 0, NCCL_DEBUG: WARN}\n")
    values = {each.name: each.value for each in job_environment.of_site(site_profile.load(path))}
    assert values == {
        "HF_HUB_OFFLINE": "0",
        "HF_DATASETS_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "GPT2HPC_MIN_ALLREDUCE_GB_S": "20",
        "NCCL_DEBUG": "WARN",
    }
    assert job_environment.of_site(Site()) == []


@pytest.mark.parametrize("block", [name for name in script.BLOCKS if name.endswith("set-up")])
def test_every_variable_that_a_block_exports_is_found(block: str) -> None:
    """By bash itself: the names after each `export` of the block."""
    text = script.text_of(block)
    for name in re.findall(r"export (?:[A-Z_]+ )?([A-Z_]+)\b", text):
        assert name in job_environment.exported(block)


def origins(text: str) -> dict[str, tuple[str, str]]:
    """`# name = value (origin)`, by name."""
    return {name: (value, origin) for name, value, origin in re.findall(r"(?m)^# (\S.*?) = (.*) \(([^()]*)\)$", text)}


def test_each_value_of_a_dry_run_tells_whence_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("train: {seed: 7}\noptimizer: {beta2: 0.99}\n")
    (tmp_path / "site.yaml").write_text(
        "partition: gpu\ngpus_per_node: 4\nimage: kit.sif\nbinds: [/scratch]\noffline: true\nsetup: [module load x]\n"
        "min_allreduce_gb_s: 12.5\nenvironment: {NCCL_DEBUG: WARN}\nsrun: {cpu-bind: cores}\nsbatch: {mail-type: END}\n"
    )
    (tmp_path / "kit.sif").touch()
    (tmp_path / "start").mkdir()
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    words = ["--nodes", "2", "--preset", "gpt2-350m", "--config", "mine.yaml", "--optimizer.beta2=0.9", "--seed", "8"]
    words += ["--site", "site.yaml", "--run-dir", "link/run", "--init", "start"]
    done = dry_run(*words, cwd=tmp_path, env={"OMP_NUM_THREADS": "3"})
    assert done.returncode == 0, done.stderr
    assert shellcheck(done.stdout, tmp_path) == ""
    found = origins(done.stdout)
    assert {
        "model.n_layer": ("24", "preset gpt2-350m"),
        "optimizer.beta1": ("0.9", "default"),
        "optimizer.beta2": ("0.9", "flag"),
        "train.seed": ("8", "flag"),
        "train.compile": ("null", "default"),
        "partition": ("gpu", "site"),
        "gpus-per-node": ("4", "site"),
        "nodes": ("2", "flag"),
        "nproc": ("4", "default"),
        "mail-type": ("END", "site: sbatch"),
        "srun --cpu-bind": ("cores", "site: srun"),
        "setup": ("module load x", "site"),
        "runtime": ("apptainer", "default"),
        "container": (str(tmp_path / "kit.sif"), "site"),
        "run-dir": (str(tmp_path / "link" / "run"), "flag"),
        "signal": ("USR2@60", "checkpoint.stop_margin_s"),
        "NCCL_DEBUG": ("WARN", "site: environment"),
        "HF_HUB_OFFLINE": ("1", "site: offline"),
        "GPT2HPC_MIN_ALLREDUCE_GB_S": ("12.5", "site: min_allreduce_gb_s, for the look at the network"),
        "OMP_NUM_THREADS": ("3", "your environment"),
    }.items() <= found.items()
    settings = [key for key in found if "." in key]
    assert len(settings) > 50
    for line in (
        f"{tmp_path} (the directory that you submit from)",
        f"{tmp_path}/link/run (the run)",
        f"{tmp_path}/real/run (where {tmp_path}/link/run leads to)",
        f"{tmp_path}/data/demo (data.dir)",
        f"{tmp_path}/start (what the run begins with)",
        "/scratch (site: binds)",
        "drivers and devices of the GPUs (--nv)",
    ):
        assert f"# {line}\n" in done.stdout
    assert f"BINDS=/scratch,{tmp_path}/start\n" in done.stdout
    assert "--cpu-bind=cores" in re.findall(r"(?m)^srun .*", done.stdout)[0]
    assert "export APPTAINERENV_HF_HUB_OFFLINE=1\n" in done.stdout
    assert "MASTER_ADDR: " in done.stdout


def test_a_file_of_settings_is_named_as_their_origin(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("train: {seed: 7}\n")
    done = dry_run("--cluster", "local", "--config", "mine.yaml", cwd=tmp_path)
    assert origins(done.stdout)["train.seed"] == ("7", "mine.yaml")


def test_the_settings_of_a_run_that_is_there_are_named_as_its_own(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("train: {seed: 7, log_every: 2}\n")
    done = dry_run("--cluster", "local", "--run-dir", "run", "--train.log_every", "3", cwd=tmp_path)
    found = origins(done.stdout)
    assert found["train.seed"] == ("7", "the run's config.yaml")
    assert found["train.log_every"] == ("3", "flag")


def test_a_value_of_several_lines_stays_a_comment(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text('environment: {A: "1\\nrm -rf here"}\n')
    done = dry_run("--nodes", "2", "--site", "site.yaml", cwd=tmp_path)
    assert "\n# A = 1 rm -rf here (site: environment)\n" in done.stdout
    assert shellcheck(done.stdout, tmp_path) == ""


# pyxis: never run here, so held by its text ---------------------------------------------------------------------------


def arrays(text: str, environment: Mapping[str, str], cwd: Path) -> dict[str, list[str]]:
    """What bash makes of `run` and `srun_python`, from the lines that set them."""
    lines = re.search(r"(?m)^srun_python=\(\) .*\n(?:.*\n)*?\[ \"\$\{#srun_python.*\n", text)
    assert lines, text
    show = 'python3 -c "import json, sys; print(json.dumps(sys.argv[1:]))"'
    program = f'paths=("$PWD/run")\n{lines[0]}\n{show} "${{run[@]}}"\n{show} "${{srun_python[@]}}"\n'
    done = subprocess.run(
        ["bash", "-euc", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=cwd,
        env={**os.environ, **environment},
    )
    run, srun_python = map(json.loads, done.stdout.splitlines())
    return {"run": run, "srun_python": srun_python}


def test_pyxis_is_asked_for_by_options_of_srun(tmp_path: Path) -> None:
    (tmp_path / "kit.sqsh").touch()
    (tmp_path / "site.yaml").write_text(
        "runtime: pyxis\nimage: kit.sqsh\nbinds: [/lustre, '/a:/b']\nenvironment: {NCCL_DEBUG: WARN}\n"
    )
    done = dry_run("--nodes", "2", "--gpus-per-node", "2", "--site", "site.yaml", "--run-dir", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert shellcheck(done.stdout, tmp_path) == ""
    assert "\nRUNTIME=pyxis\n" in done.stdout
    assert "\nexport NCCL_DEBUG=WARN\n" in done.stdout
    assert "ENV_NCCL_DEBUG" not in done.stdout  # those are Apptainer's
    names = re.findall(r"(?m)^CONTAINER_ENV=(.*)$", done.stdout)[0].split(",")
    assert {"NCCL_DEBUG", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS", "TRITON_CACHE_DIR"} <= set(names)
    assert re.search(r'(?m)^srun .*--kill-on-bad-exit=1 .*"\$\{srun_python\[@\]\}" -u -m submitit', done.stdout)
    assert '| "${run[@]}" -m gpt2hpc.cluster.requeue decide' in done.stdout

    (tmp_path / "run").mkdir()
    variables = {
        "IMAGE": str(tmp_path / "kit.sqsh"),
        "RUNTIME": "pyxis",
        "BINDS": "/lustre,/a:/b",
        "CONTAINER_ENV": "A,B",
    }
    made = arrays(done.stdout, variables, tmp_path)
    here = str(tmp_path)
    assert made["srun_python"] == [
        f"--container-image={here}/kit.sqsh",
        f"--container-mounts={here},{here}/run,/tmp,/lustre,/a:/b",
        f"--container-workdir={here}",
        "--no-container-mount-home",
        "--container-readonly",
        "--no-container-entrypoint",
        "--container-env=A,B",
        "python3",
    ]
    assert made["run"] == ["in_a_step"]
    assert arrays(done.stdout, {"IMAGE": "", "PYTHON": "/p"}, tmp_path) == {"run": ["/p"], "srun_python": ["/p"]}


@pytest.mark.parametrize("image", ["nvcr.io#nvidia/pytorch:25.01-py3", "docker://debian:12", "debian:12"])
def test_pyxis_takes_an_image_of_a_registry(image: str) -> None:
    assert Site(runtime="pyxis", image=image).image_to_use(None, binds=[]) == image
    with pytest.raises(ConfigError, match="does not exist"):
        Site(image=image).image_to_use(None, binds=[])


# docker: what srun and the batch script run; the real one is tests/container's ----------------------------------------


def test_docker_is_run_by_each_rank(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("image: kit:1\nbinds: [/lustre, '/a:/b']\nenvironment: {NCCL_DEBUG: WARN}\n")
    words = ["--nodes", "2", "--gpus-per-node", "2", "--site", "site.yaml", "--run-dir", "run", "--runtime", "docker"]
    done = dry_run(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert shellcheck(done.stdout, tmp_path) == ""
    assert origins(done.stdout)["runtime"] == ("docker", "flag")
    assert "\nexport NCCL_DEBUG=WARN\n" in done.stdout
    assert "ENV_NCCL_DEBUG" not in done.stdout  # those are Apptainer's
    (tmp_path / "run").mkdir()
    variables = {"IMAGE": "kit:1", "RUNTIME": "docker", "BINDS": "/lustre,/a:/b,/tmp", "SLURM_GPUS_ON_NODE": "2"}
    made = arrays(done.stdout, variables, tmp_path)
    assert made["run"] == made["srun_python"]
    assert made["run"][-1] == "kit:1"
    pairs = list(zip(made["run"], made["run"][1:], strict=False))
    mounted = [value for name, value in pairs if name == "--mount"]
    here = str(tmp_path)
    paths = ("/tmp", here, f"{here}/run", "/lustre")
    expected = [*((path, path) for path in paths), ("/a", "/b")]
    assert mounted == [f"type=bind,source={source},target={target}" for source, target in expected]
    assert ("--user", f"{os.getuid()}:{os.getgid()}") in pairs

    shown = tmp_path / "docker"
    shown.write_text('#!/bin/sh\n[ "$1" = ps ] || printf "%s\\n" "$@"\n')
    shown.chmod(0o755)
    secret = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "HF_TOKEN": "hf_planted",
        "SLURM_JOB_ID": "7",
        "CUDA_VISIBLE_DEVICES": "0",
    }
    secret |= {"SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_GPUS": "2,3"}
    said = subprocess.run(
        [*made["run"], "-V"], env={**os.environ, **secret}, capture_output=True, text=True, check=True
    )
    words = said.stdout.splitlines()
    assert words[-2:] == ["kit:1", "-V"]
    assert "HF_TOKEN" in words
    assert "PATH" not in words
    assert "hf_planted" not in said.stdout  # handed on by its name alone
    assert "gpt2hpc.start=7.0" in words
    assert words[words.index("--gpus") + 1] == '"device=2,3"', "by the node's numbers, which no cgroup has changed"
    assert "CUDA_VISIBLE_DEVICES" not in words


@pytest.mark.parametrize("image", ["/a/kit.sif", "kit.sif", "./kit"])
def test_docker_takes_no_file(image: str) -> None:
    assert Site(runtime="docker", image="me/kit:1").image_to_use(None, binds=[]) == "me/kit:1"
    with pytest.raises(ConfigError, match="takes the name of an image"):
        Site(runtime="docker").image_to_use(image, binds=[])


def test_a_flag_may_do_without_the_image_of_the_site(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("image: /nowhere/kit.sif\nruntime: apptainer\n")
    for job in ([], ["pipeline"]):
        done = dry_run(*job, "--nodes", "2", "--site", "site.yaml", "--runtime", "none", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert origins(done.stdout)["container"] == ("none", "flag")


@pytest.mark.parametrize("name", ["HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "my_password"])
def test_a_secret_in_a_profile_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    with pytest.raises(ConfigError, match=f"environment has {name}, which would stand in every batch script"):
        site_profile.read(f"environment: {{{name}: $HF_TOKEN}}", path)
    site_profile.read("environment: {TOKENIZERS_PARALLELISM: false, HF_TOKEN_PATH: /home/me/token}", path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "setup: [export HF_TOKEN=hunter2]",
            "setup has the value of HF_TOKEN, which would stand in every batch script",
        ),
        ("setup: [module load x, 'export A=1 WANDB_API_KEY=\"0123\"']", "setup has the value of WANDB_API_KEY"),
        (f"sbatch: {{comment: hf_{'a' * 34}}}", "sbatch has what looks like a token of the Hub"),
        (f"setup: [hf auth login --with hf_{'a' * 34}]", "setup has what looks like a token of the Hub"),
    ],
)
def test_a_secret_that_is_written_out_is_refused(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said) as refusal:
        site_profile.read(text, tmp_path / "site.yaml")
    assert not re.search("hunter2|0123|aaa", refusal.value.line)


@pytest.mark.parametrize(
    "line",
    ["export HF_TOKEN=$(cat ~/token)", 'export HF_TOKEN="$MINE"', "export HF_TOKEN", "HF_TOKEN= true", "A=hf_hub.sh"],
)
def test_what_names_a_secret_but_reveals_nothing_stays(line: str, tmp_path: Path) -> None:
    assert site_profile.read(f"setup: ['{line}']", tmp_path / "site.yaml").setup == (line,)


def test_a_profile_that_is_no_yaml_is_told_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    with pytest.raises(ConfigError) as refusal:
        site_profile.read("partition: gpu\naccount: a: b\n", path)
    assert refusal.value.line.startswith(f"site profile {path}, line 2: mapping values are not allowed here; mend")


# What a site deletes --------------------------------------------------------------------------------------------------


def test_a_run_where_the_site_deletes_files_is_warned_of(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    (scratch / "short").mkdir(parents=True)
    (tmp_path / "home").symlink_to(scratch)
    site = Site(purged={str(scratch): 30, str(scratch / "short"): 7})
    named = {"--run-dir": tmp_path / "home" / "run", "--data.dir": tmp_path / "data"}
    (line,) = site_warnings.purged(site, named)
    assert line.startswith(f"--run-dir={tmp_path}/home/run (that is {scratch}/run) lies on {scratch}, ")
    assert "after 30 days" in line
    (line,) = site_warnings.purged(site, {"--out": scratch / "short" / "data"})
    assert "after 7 days" in line
    assert site_warnings.purged(site, {"--out": tmp_path / "scratchy"}) == []


@pytest.mark.parametrize(
    "words",
    [
        ["--nodes", "2", "--run-dir", "link/run"],
        ["--nodes", "2", "--data.dir", "link/data"],
    ],
    ids=["run", "data"],
)
def test_a_dry_run_warns_too_and_stays_a_script(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "link").symlink_to("scratch")
    (tmp_path / "site.yaml").write_text("purged: {$SCRATCH: 14, $NOT_SET_HERE: 3}\n")
    done = dry_run(*words, "--site", "site.yaml", cwd=tmp_path, env={"SCRATCH": str(tmp_path / "scratch")})
    assert done.returncode == 0
    purged, refused = done.stderr.splitlines()
    assert re.fullmatch(r"gpt2hpc: warning: --\S+=\S*link/\w+ \(that is \S+\) lies on .* after 14 days: .*", purged)
    assert refused.startswith("gpt2hpc: warning: a start would be refused: ")
    assert shellcheck(done.stdout, tmp_path) == ""


def test_a_pipeline_warns_too(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text(f"purged: {{{tmp_path}: 14}}\noffline: true\n")
    words = ["--source", ".", "--data.dir", "data", "--run-dir", "run", "--checkpoint.repo", "me/model"]
    done = dry_run("pipeline", "--site", "site.yaml", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for told in (r"--run-dir=\S+ lies on", r"--data.dir=\S+ lies on", r"checkpoints for me/model wait"):
        assert re.search(told, done.stderr), done.stderr


def test_an_array_for_a_directory_that_is_purged_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text\n")
    (tmp_path / "site.yaml").write_text(f"purged: {{{tmp_path}: 14}}\nenvironment: {{A: b}}\n")
    words = ["prepare", "--source", "a.txt", "--out", "out", "--site", "site.yaml", "--array", "3"]
    done = dry_run(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "warning: --out=" in done.stderr
    assert shellcheck(done.stdout, tmp_path) == ""
    found = origins(done.stdout)
    assert found["array"] == ("3", "flag")
    assert found["source"] == ("a.txt", "flag")
    assert found["tokenizer"] == ("auto", "default")
    assert found["A"] == ("b", "site: environment")
    assert "MASTER_ADDR" not in done.stdout


def test_nodes_without_internet_are_spoken_of(tmp_path: Path) -> None:
    (tmp_path / "site.yaml").write_text("offline: true\n")
    words = [
        "--nodes",
        "2",
        "--site",
        "site.yaml",
        "--checkpoint.repo",
        "me/model",
        "--data.dir",
        "hf://datasets/me/data",
    ]
    done = dry_run(*words, cwd=tmp_path, env={"HF_HUB_OFFLINE": "1"})
    assert "checkpoints for me/model wait until you run `gpt2hpc sync RUN_DIR` on a login node" in done.stderr
    assert "data.dir=hf://datasets/me/data will do only where" in done.stderr


def test_the_keys_that_are_documented_are_those_there_are(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "sites.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    site = site_profile.read(block, tmp_path / "site.yaml")
    assert site.given == set(Site.__dataclass_fields__) - {"path", "given"}
    assert set(re.findall(r"(?m)^\| `(\w+)` \|", page)) == set(SHIPPED)
