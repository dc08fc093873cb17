"""`gpt2hpc doctor`: whether what a training will need is there, before it is needed.

Exit code 0, or 8 if something is missing; each line says what to do about it. It changes nothing, and takes seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from gpt2hpc import __version__, cli, config_io
from gpt2hpc.checks import programs, rounds
from gpt2hpc.checks.rounds import Group
from gpt2hpc.checks.scene import Scene
from gpt2hpc.cluster import choices, site_profile
from gpt2hpc.cluster.choices import Choices
from gpt2hpc.cluster.site_profile import Site
from gpt2hpc.config import Config
from gpt2hpc.errors import ConfigError, MissingError, UsageError
from gpt2hpc.finding import Finding, missing, ok, to_json, warn
from gpt2hpc.run_dir import RunDir

T = TypeVar("T")
EPILOG = (
    "Each line is OK, WARN (it works, or cannot be known from here) or MISSING (a training would fail), with what to do. "
    "Exit code: 0, or 8 if something is MISSING."
)


def new_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="gpt2hpc doctor",
        description="Look at what a training will need: Slurm, container, GPUs, network, disks, limits, Python. Changes nothing.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "--run-dir", type=Path, metavar="DIR", help="where the run will be, or is (default: runs/train)"
    )
    parser.add_argument("--data", metavar="DIR", help="prepared data, to be looked at too")
    parser.add_argument(
        "--preset", metavar="NAME", help="the size of model to have room for (default: the run's, else gpt2-124m)"
    )
    parser.add_argument("--gpu", action="store_true", help="this machine should have a GPU: none is MISSING")
    parser.add_argument(
        "--hub",
        metavar="USER/NAME",
        help="only this: whether checkpoints may be uploaded to this model repository; creates nothing",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of lines")
    asked = parser.add_argument_group("what a job would ask for, as in gpt2hpc submit")
    asked.add_argument("--nodes", type=int, default=1, help="Nodes.")
    asked.add_argument("--gpus-per-node", type=int, help="GPUs on each node (default: the site's).")
    asked.add_argument("--time", metavar="LIMIT", help="Time limit of each attempt (default: the site's).")
    choices.add_options(asked)
    cli.add_examples(
        parser,
        "gpt2hpc doctor                                   # this machine and its cluster",
        "gpt2hpc doctor --run-dir runs/mine --data data/mine --preset gpt2-350m --nodes 4 --gpus-per-node 4",
        "gpt2hpc doctor --site site.yaml --container gpt2hpc.sif",
        "gpt2hpc doctor --gpu                             # on a node that computes, as after srun -N1",
        "gpt2hpc doctor --hub USER/NAME                   # only whether checkpoints may go there",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    arguments = new_parser().parse_args(argv)
    groups: Sequence[Group]
    found: list[Finding]
    if arguments.hub:
        scene, found, groups = Scene(os.environ, config=_with_repo(Config(), arguments.hub)), [], (rounds.HUB,)
    else:
        scene, found = _scene(arguments)
        groups = rounds.groups_for(scene)
    reports = list(rounds.made(groups, scene))
    every = [*found, *(finding for _, findings in reports for finding in findings)]
    if arguments.json:
        cli.say(to_json(every))
    elif arguments.hub:
        cli.say("\n".join(finding.line for finding in every))
    else:
        cli.say(
            rounds.page([f"gpt2hpc {__version__}, {_place(scene)}", *(each.line for each in found)], reports, every)
        )
    return MissingError.exit_code if any(finding.state == "MISSING" for finding in every) else 0


def _place(scene: Scene) -> str:
    """Which machine this is to the cluster."""
    host = os.uname().nodename
    if scene.is_in_job:
        return f"on node {scene.env['SLURMD_NODENAME']} in job {scene.env['SLURM_JOB_ID']}"
    if scene.is_in_image:
        return f"in a container image on {host}"
    return f"on {host}, {'from where jobs are submitted' if scene.has_slurm else 'without a Slurm'}"


def _scene(arguments: argparse.Namespace) -> tuple[Scene, list[Finding]]:
    """What is to be looked at; a site's profile or a run's settings that cannot be read are findings themselves."""
    given, run, found = vars(arguments), RunDir(arguments.run_dir or Path("runs/train")), list[Finding]()
    config, is_of_run = _read("settings", run.path, lambda: _config(arguments.preset, run), (Config(), False), found)
    profile = given["site"] or os.environ.get(site_profile.VARIABLE) or site_profile.own_path(os.environ)
    chosen = _read("site profile", profile, lambda: Choices(given, os.environ), None, found)
    site, asked, gpus = Site(), dict[str, object](), given["gpus_per_node"]
    if chosen is not None:
        site, asked, gpus = chosen.site, *_asked(chosen)
        if site.path:
            found.append(ok("site profile", str(site.path)))
    scene = Scene(
        env=os.environ,
        site=site,
        asked={name: value for name, value in asked.items() if value is not None},
        image=_image(site, given["container"]),
        run=run,
        config=config,
        data=arguments.data or (config.data.dir if is_of_run else None),
        nodes=arguments.nodes,
        gpus_per_node=gpus,
        wants_gpu=arguments.gpu,
    )
    return dataclasses.replace(scene, image=None) if scene.is_in_image else scene, found  # images do not nest


def _read(name: str, where: Path | str, question: Callable[[], T], instead: T, found: list[Finding]) -> T:
    """The answer; where files are wrong, or their disk does not answer, that is found, and `instead` stands in."""
    try:
        return programs.in_time(question)
    except ConfigError as error:
        found.append(missing(name, error.line))
    except TimeoutError:
        text = f"{where} does not answer in {programs.PATIENCE_S:g} s, and is not looked at; does its disk hang?"
        found.append(warn(name, text))
    except OSError as error:
        found.append(missing(name, f"{where} cannot be read ({error.strerror})"))
    return instead


def _config(preset: str | None, run: RunDir) -> tuple[Config, bool]:
    """The preset's settings, else the run's, else the defaults; and whether they are the run's."""
    if preset is not None:
        known = config_io.presets()
        if preset not in known:
            raise UsageError(f"--preset={preset} is none; the presets are {', '.join(known)}")
        return config_io.load(known[preset]), False
    if not run.config.exists():
        return Config(), False
    return config_io.load(run.config), True


def _asked(chosen: Choices) -> tuple[dict[str, object], int | None]:
    """What sbatch would be asked for, and GPUs of a node."""
    asked: dict[str, object] = chosen.sbatch_options()
    for name in ("time", "cpus_per_task"):
        asked[name.replace("_", "-")] = chosen.of(name)
    gpus = chosen.of("gpus_per_node")
    asked |= {name.replace("_", "-"): value for name, value in chosen.site.gpu_request(gpus).items()}
    return asked, gpus


def _image(site: Site, option: str | None) -> str | None:
    """The image as `submit` would name it: an absolute path, or a name in a registry; whether it is there, a check says."""
    named = None if "none" in (option, site.runtime) else option or site.image
    if named is None:
        return None
    try:
        return programs.in_time(lambda: site.image_to_use(option, binds=()))
    except (ConfigError, OSError):
        return os.path.abspath(Path(named).expanduser())  # noqa: PTH100 -- links stay as they are


def _with_repo(config: Config, repo: str) -> Config:
    return dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, repo=repo))


if __name__ == "__main__":
    sys.exit(cli.run(main))
