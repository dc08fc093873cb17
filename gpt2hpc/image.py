"""`gpt2hpc image build` and `gpt2hpc image check`: a container image, made and looked at on a login node, without root or torch."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gpt2hpc
from gpt2hpc import cli, durable
from gpt2hpc.checks import container, gpu, image, interpreter, rounds, slurm
from gpt2hpc.checks.rounds import Group
from gpt2hpc.checks.scene import Scene
from gpt2hpc.cluster import image_build, image_file, signals, site_profile
from gpt2hpc.cluster.image_build import Build
from gpt2hpc.cluster.site_profile import OF_SIF
from gpt2hpc.errors import MissingError, UsageError
from gpt2hpc.finding import Finding, missing, to_json

RUN_ALONE = ("pyxis", "docker")
"""What a site may run images by, and not build them."""


def new_parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="gpt2hpc image",
        description="Build a container image, or check one against this gpt2hpc and this site. Needs Apptainer, no root, no torch.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="build|check")
    _add_build(verbs.add_parser("build", help="make a SIF of a definition file or a docker archive"))
    _add_check(verbs.add_parser("check", help="what an image is, and whether it runs here"))
    cli.add_examples(
        parser,
        "gpt2hpc image build                                    # gpt2hpc.sif, in a checkout",
        "gpt2hpc image build --dry-run",
        "gpt2hpc image check gpt2hpc.sif",
    )
    return parser


def _add_build(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Build a SIF: whole, or not there at all. Afterwards it is checked as by `gpt2hpc image check`."
    )
    parser.add_argument(
        "--out", type=Path, default=Path("gpt2hpc.sif"), metavar="FILE", help="the image (default: gpt2hpc.sif)"
    )
    parser.add_argument(
        "--from",
        dest="source",
        metavar="SOURCE",
        help=f"a definition file, or {image_build.ARCHIVE}FILE (default: {image_build.DEFINITION} of the checkout)",
    )
    parser.add_argument("--torch", metavar="SPEC", help="what pip installs as torch, as torch==2.13.0")
    parser.add_argument(
        "--torch-index-url", metavar="URL", help="the index that torch comes from, for another CUDA or the CPU"
    )
    parser.add_argument(
        "--base", metavar="IMAGE", help="the base image: of a registry, or as localimage:PATH, docker-archive:FILE"
    )
    parser.add_argument(
        "--build-arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other argument of the definition file",
    )
    parser.add_argument(
        "--tmp-dir", metavar="DIR", help="where it is unpacked (default: $APPTAINER_TMPDIR, $TMPDIR or /tmp)"
    )
    parser.add_argument("--force", action="store_true", help="replace an image that is there")
    parser.add_argument("--dry-run", action="store_true", help="print what would be done; build nothing")
    _add_site(parser)
    parser.add_argument(
        "options", nargs="*", metavar="-- OPTION", help="options for the runtime's own build, after `--`"
    )
    cli.add_examples(
        parser,
        "gpt2hpc image build --torch-index-url https://download.pytorch.org/whl/cu126     # for older drivers",
        "gpt2hpc image build --from docker-archive:gpt2hpc.tar --out gpt2hpc.sif",
        "gpt2hpc image build --dry-run -- --bind ./wheels:/mnt",
    )


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Look at an image: labels, version, and whether it runs here: runtime, FUSE, driver, binds. Changes nothing."
    )
    parser.add_argument(
        "image", metavar="IMAGE", help="a SIF, an unpacked image, a squashfs file of enroot's or a docker archive"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of lines")
    _add_site(parser)
    cli.add_examples(parser, "gpt2hpc image check gpt2hpc.sif", "gpt2hpc image check gpt2hpc.tar --json")


def _add_site(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(site_profile.shipped())
    parser.add_argument("--site", metavar="FILE", help=f"site profile, or the name of an example: {names}")
    parser.add_argument(
        "--runtime", choices=OF_SIF, help="what builds and runs it (default: the site's, or what is on PATH)"
    )


def main(argv: Sequence[str]) -> int:
    arguments = new_parser().parse_args(argv)
    return (
        _build(arguments) if arguments.verb == "build" else _check(arguments.image, arguments, as_json=arguments.json)
    )


def _build(arguments: argparse.Namespace) -> int:
    build = _planned(arguments)
    if build.out.exists() and not arguments.force:
        raise UsageError(
            f"{build.out} is there already; look at it (gpt2hpc image check), then --force to replace it, or --out FILE"
        )
    shown = shlex.join(build.command(build.out))
    where = f"in {build.source.path.parent}, unpacked in {build.scratch}"
    if arguments.dry_run:
        cli.say(shown)
        cli.aside(where)
    else:
        cli.say(f"{shown}\n{where}")
    for line in image_build.warnings(build):
        cli.warn(line)
    if arguments.dry_run:
        return 0
    with signals.as_interrupts():
        _run(build)
    cli.say(f"{build.out}: {build.out.stat().st_size / 1e9:,.2f} GB")
    return _check(str(build.out), arguments, as_json=False)


def _planned(arguments: argparse.Namespace) -> Build:
    here = Path.cwd()
    for given in (*arguments.build_arg, *arguments.options):
        name = given.partition("=")[0]
        image_build.refuse_credentials("an option" if "://" in name else name, given)
    source = image_build.find_source(arguments.source, here=here, package=Path(gpt2hpc.__file__).parent)
    given = image_build.settled_arguments(
        source,
        torch=arguments.torch,
        index_url=arguments.torch_index_url,
        base=arguments.base,
        pairs=arguments.build_arg,
        here=here,
    )
    out = here / arguments.out.expanduser()
    if not out.parent.is_dir() or out.is_dir():
        raise UsageError(f"--out={out} must be a file in a directory that is there; make it, or choose another")
    runtime = _runtime(arguments, needed=not arguments.dry_run)
    scratch = image_build.scratch_dir(arguments.tmp_dir, runtime, os.environ)
    return Build(runtime, source, out, scratch, given, tuple(arguments.options))


def _runtime(arguments: argparse.Namespace, *, needed: bool) -> str:
    """The one that is named or the site's, else one that is here."""
    site = site_profile.find(arguments.site, os.environ)
    wished = arguments.runtime or (site.runtime if site.runtime in OF_SIF and "runtime" in site.given else None)
    names = (wished,) if wished else OF_SIF
    here = next((name for name in names if shutil.which(name)), None)
    if here is None and needed:
        raise MissingError(
            f"{' and '.join(names)} not on PATH: load the module (`module load apptainer`), or build elsewhere and copy the file"
        )
    return here or names[0]


def _run(build: Build) -> None:
    """Build beside, then rename: the image is whole or absent, and one that is there stays until then."""
    beside, process = durable.temporary_name(build.out), None
    try:
        try:
            with signals.held():
                process = subprocess.Popen(
                    build.command(beside), cwd=build.source.path.parent, env={**os.environ, **build.environment()}
                )
            code = process.wait()
        except KeyboardInterrupt as interrupt:
            if process is not None:
                if isinstance(interrupt, signals.Told):
                    process.terminate()  # told alone, perhaps, and Ctrl-C has reached it too; it removes what it has unpacked
                process.wait()
            raise
        if code or not beside.is_file():
            raise MissingError(
                f"{build.runtime} build ended with exit code {code}; what it printed last says why. {build.out} is as it was"
            )
        beside.replace(build.out)
        durable.fsync_dir(build.out.parent)
    finally:
        beside.unlink(missing_ok=True)


def _check(named: str, arguments: argparse.Namespace, *, as_json: bool) -> int:
    path = Path.cwd() / Path(named).expanduser()
    reports = list(rounds.made(*_asked(path, arguments)))
    every = [finding for _, findings in reports for finding in findings]
    if as_json:
        cli.say(to_json(every))
    else:
        cli.say(rounds.page([str(path)], reports, every))
    return MissingError.exit_code if any(finding.state == "MISSING" for finding in every) else 0


def _asked(path: Path, arguments: argparse.Namespace) -> tuple[list[Group], Scene]:
    """What is looked at, for an image of that kind."""
    site = site_profile.find(arguments.site, os.environ)
    runtime: Any = site.runtime
    if arguments.runtime or site.runtime not in RUN_ALONE:
        runtime = _runtime(arguments, needed=False)
    scene = Scene(env=os.environ, site=dataclasses.replace(site, runtime=runtime), image=str(path))
    if not os.access(path, os.R_OK):
        return [Group("The image", _absent)], scene
    own = Group("The image", image.look)
    if image_file.kind_of(path) is None:  # an archive, perhaps, which takes a while to read
        return [own], scene
    return [
        own,
        Group("What runs it", container.look),
        Group("Slurm", slurm.of_image),
        Group("Its Python", _ranks, patience_s=interpreter.PATIENCE_S + 30.0),
    ], scene


def _absent(scene: Scene) -> list[Finding]:
    return [missing("file", f"{scene.image} is not there, or may not be read; gpt2hpc image build makes one")]


def _ranks(scene: Scene) -> list[Finding]:
    """The image's Python and torch, and the driver here against the CUDA of that torch."""
    found = interpreter.probe(scene)
    return [*interpreter.look(scene, found), *gpu.look(scene, found)]


if __name__ == "__main__":
    sys.exit(cli.run(main))
