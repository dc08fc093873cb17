"""What was compiled is found again by later jobs of the same user on the node, and by nobody else's leave."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gpt2hpc.cluster import compile_cache
from gpt2hpc.cluster.compile_cache import PLACE, UnfitError
from gpt2hpc.cluster.dist_env import DistEnv
from gpt2hpc.cluster.file_system import Mount

ENV = DistEnv.from_env({"RANK": "0", "WORLD_SIZE": "1"})


def settled(place: Path, **environ: str) -> dict[str, str]:
    variables = {PLACE: str(place), **environ}
    compile_cache.settle(variables, ENV)
    return variables


def own(place: Path) -> Path:
    return place / f"gpt2hpc-{os.getuid()}-compiled"


def test_a_later_job_gets_the_same_directory_which_is_private(tmp_path: Path) -> None:
    first, second = (settled(tmp_path / "node", SLURM_JOB_ID=job) for job in ("1", "2"))
    for name, last in compile_cache.FOLDERS.items():
        assert first[name] == second[name]
        assert Path(first[name]).name == last
        assert own(tmp_path / "node") in Path(first[name]).parents
    assert own(tmp_path / "node").stat().st_mode & 0o777 == 0o700


def test_what_is_named_already_stays(tmp_path: Path) -> None:
    found = settled(tmp_path, TRITON_CACHE_DIR="/mine")
    assert found["TRITON_CACHE_DIR"] == "/mine"
    assert found["CUDA_CACHE_PATH"].startswith(str(tmp_path))
    every = dict.fromkeys(compile_cache.FOLDERS, "/mine")
    assert compile_cache.settle({**every, PLACE: str(tmp_path / "unused")}, ENV) is None
    assert not (tmp_path / "unused").exists()


def of_another_user(path: Path) -> None:
    if os.getuid() != 0:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("only root can give a directory away")
    path.mkdir(mode=0o755)
    os.chown(path, 65534, 65534)


def open_to_all(path: Path) -> None:
    path.mkdir()
    path.chmod(0o777)


def a_link(path: Path) -> None:
    (path.parent / "elsewhere").mkdir(mode=0o700)
    path.symlink_to(path.parent / "elsewhere")


def in_a_place_where_all_may_rename(path: Path) -> None:
    path.mkdir(mode=0o700)
    path.parent.chmod(0o777)


UNFIT = {
    of_another_user: "belongs to another user (uid 65534)",
    open_to_all: "may be written by others (mode 777)",
    a_link: "is no directory",
    in_a_place_where_all_may_rename: "lets every user rename",
}


@pytest.mark.parametrize("made", UNFIT, ids=lambda made: made.__name__)
def test_a_directory_that_is_not_the_users_alone_is_not_used(made: object, tmp_path: Path) -> None:
    place = tmp_path / "node"
    place.mkdir()
    made(own(place))  # type: ignore[operator]
    program = (
        "import os; from gpt2hpc.cluster import compile_cache; from gpt2hpc.cluster.dist_env import DistEnv\n"
        "folder = compile_cache.settle(os.environ, DistEnv.from_env(os.environ))\n"
        "print(folder, os.environ['TRITON_CACHE_DIR'], oct(folder.stat().st_mode & 0o777))"
    )
    given = {name: value for name, value in os.environ.items() if name not in compile_cache.FOLDERS}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={**given, PLACE: str(place)}
    )
    folder, triton, mode = done.stdout.split()
    assert not Path(folder).is_relative_to(tmp_path)
    assert Path(triton).parent == Path(folder)
    assert mode == "0o700"
    assert not Path(folder).exists(), "it outlives its process"
    assert done.stderr.count("\n") == 1
    assert UNFIT[made] in done.stderr  # type: ignore[index]
    assert folder in done.stderr
    assert list(own(place).iterdir()) == [], "something was written there"


@pytest.mark.parametrize(
    ("name", "root", "lasts"),
    [
        ("/tmp", "/", True),
        ("/tmp/slurm.4711", "/", False),
        ("/local/4711/tmp", "/", False),
        ("/tmp/14711", "/", True),
        ("/tmp", "/containers/4711/.4711", False),
    ],
)
def test_a_place_of_the_job_alone_does_not_outlive_it(
    name: str, root: str, lasts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compile_cache.file_system, "of", lambda path: Mount("/tmp", "ext4", "rw", root))
    assert compile_cache.outlives(Path(name), "4711") == lasts


ON_A_MOUNT = """
mkdir -p "$1/base/4711/.4711" "$1/tmp"
mount --bind "$1/base/4711/.4711" "$1/tmp" && TMPDIR=$1/tmp exec "$2" -c '
import os
from gpt2hpc.cluster import compile_cache
print(compile_cache._place(os.environ))'
"""


def test_what_slurm_mounts_for_each_job_is_not_taken(tmp_path: Path) -> None:
    if os.getuid() != 0:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("only root can mount what Slurm would")
    given = {name: value for name, value in os.environ.items() if name != PLACE}
    found = {}
    for job in ("4711", "4712"):
        done = subprocess.run(
            ["unshare", "-m", "bash", "-c", ON_A_MOUNT, "bash", str(tmp_path), sys.executable],
            capture_output=True,
            text=True,
            check=True,
            env={**given, "SLURM_JOB_ID": job},
        )
        found[job] = Path(done.stdout.strip())
    assert found["4711"] in (Path("/tmp"), Path("/var/tmp"))
    assert found["4712"] == tmp_path / "tmp", "that of another job's number is no reason"


def test_a_shared_disk_has_a_directory_for_each_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_cache.file_system, "of", lambda path: Mount("/", "nfs4"))
    nodes = [DistEnv.from_env({"SLURMD_NODENAME": name, "RANK": "0", "WORLD_SIZE": "1"}) for name in ("n1", "n2")]
    one, other = (compile_cache.settle({PLACE: str(tmp_path)}, env) for env in nodes)
    assert one is not None
    assert other is not None
    assert (one.parent.name, other.parent.name) == ("n1", "n2")


def test_what_another_torch_compiled_goes_when_it_is_old(tmp_path: Path) -> None:
    folder = Path(settled(tmp_path)["TRITON_CACHE_DIR"]).parent
    old, recent = folder.with_name("cpython-39-torch-1.0"), folder.with_name("cpython-39-torch-1.1")
    for path, days in ((old, 31), (recent, 29), (folder, 31)):
        path.mkdir(exist_ok=True)
        os.utime(path, (time.time() - days * 86400,) * 2)
    settled(tmp_path)
    assert sorted(folder.parent.iterdir()) == sorted([recent, folder])


def test_a_directory_of_ones_own_is_made_private(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o755)
    compile_cache.refuse_unless_private(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    with pytest.raises(FileNotFoundError):
        compile_cache.refuse_unless_private(tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(UnfitError, match="is no directory"):
        compile_cache.refuse_unless_private(tmp_path / "file")


def test_another_operator_of_ours_is_another_software(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler's own keys have its name only, and its gradient is compiled in."""
    before = compile_cache._software()
    copy = tmp_path / "model"
    shutil.copytree(compile_cache.MODEL, copy)
    monkeypatch.setattr(compile_cache, "MODEL", copy)
    assert compile_cache._software() == before
    (copy / "fused_loss.py").write_text((copy / "fused_loss.py").read_text().replace("of_weight * grad", "of_weight"))
    assert compile_cache._software() != before
