"""The committed locks, and the command that packs a lock's wheels for the nodes.

Nothing here reaches an index: the wheelhouse runs on locks of its own, against a folder of wheels made on the spot.
"""

from __future__ import annotations

import hashlib
import os
import re
import resource
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCKS = Path(__file__).parents[2] / "files" / "locks"
NODE_LOCKS = [f"{name}-py{python}.txt" for name in ("airflow", "spark", "watchdog") for python in ("3.11", "3.13")]
ALL_LOCKS = [*NODE_LOCKS, "controller.txt"]


def digest(path: Path) -> str:
    """Return the hexadecimal SHA-256 digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def entries(lock: str) -> list[str]:
    """Return a lock's requirements, one logical line each, without options and comments."""
    text = re.sub(r"#.*", "", (LOCKS / lock).read_text().replace("\\\n", " "))
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("-")]


def pins(lock: str) -> dict[str, str]:
    """Return a lock's versions by normalized distribution name."""
    pairs = (entry.split()[0].split("==") for entry in entries(lock))
    return {canonicalize_name(name): version for name, version in pairs}


def demands(source: str) -> list[Requirement]:
    """Return what an .in file asks for."""
    lines = (line.partition("#")[0].strip() for line in (LOCKS / source).read_text().splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


@pytest.mark.parametrize("lock", ALL_LOCKS)
def test_every_requirement_is_pinned_and_hashed(lock: str) -> None:
    pattern = re.compile(r"[A-Za-z0-9._-]+==[^\s;]+(\s*;[^\\]*?)?(\s+--hash=sha256:[0-9a-f]{64})+")
    assert entries(lock)
    assert [entry for entry in entries(lock) if not pattern.fullmatch(entry)] == []


@pytest.mark.parametrize("lock", NODE_LOCKS)
def test_node_locks_hold_no_markers(lock: str) -> None:
    # wheelhouse.py does not evaluate them: the controller's Python is not the node's.
    assert [entry for entry in entries(lock) if ";" in entry] == []


@pytest.mark.parametrize("lock", ALL_LOCKS)
def test_the_header_names_the_one_command(lock: str) -> None:
    assert "make locks" in (LOCKS / lock).read_text().splitlines()[1]


def test_no_index_and_no_path_of_a_machine() -> None:
    # Whole URLs, host names without a scheme, and absolute paths of a build machine.
    pattern = re.compile(r"https?://|file://|pypi\.[a-z]|pythonhosted|debian\.(org|net)|/(home|root|tmp|work|Users)/")
    files = [path for path in LOCKS.iterdir() if path.suffix in {".in", ".txt", ".py", ".sh"}]
    assert len(files) >= 3 + len(ALL_LOCKS)
    found = [f"{path.name}: {line}" for path in files for line in path.read_text().splitlines() if pattern.search(line)]
    assert found == []


@pytest.mark.parametrize(
    ("source", "lock"),
    [(re.sub(r"(-py.*)?\.txt", ".in", lock), lock) for lock in ALL_LOCKS],
)
def test_locks_meet_their_demands(source: str, lock: str) -> None:
    locked = pins(lock)
    for demand in demands(source):
        version = locked.get(canonicalize_name(demand.name))
        assert version is not None, f"{lock} lacks {demand.name}: run `make locks`"
        assert demand.specifier.contains(version), f"{lock} has {demand.name} {version}, not {demand.specifier}"


def test_airflow_locks_agree_on_what_was_asked_for() -> None:
    old, new = pins("airflow-py3.11.txt"), pins("airflow-py3.13.txt")
    names: set[str] = {canonicalize_name(demand.name) for demand in demands("airflow.in")}
    names |= {name for name in old.keys() | new.keys() if name.startswith("apache-airflow")}
    assert {name: old.get(name) for name in names} == {name: new.get(name) for name in names}


@pytest.mark.parametrize("lock", ["airflow-py3.11.txt", "airflow-py3.13.txt"])
def test_airflow_versions_and_providers(lock: str) -> None:
    locked = pins(lock)
    assert locked["apache-airflow"] == locked["apache-airflow-core"] == "3.3.2"
    assert tuple(map(int, locked["celery"].split(".")[:2])) < (5, 7)
    for extra in ("celery", "postgres", "redis", "fab", "apache-spark", "hashicorp", "amazon", "standard"):
        assert f"apache-airflow-providers-{extra}" in locked
    assert "statsd" in locked
    # The client brings no jars and must not meet the real one in an environment.
    assert "pyspark-client" in locked
    assert "pyspark" not in locked


@dataclass
class Lab:
    """A copy of the command with locks of its own and an index that is a local folder.

    Attributes:
        locks: the folder that stands for files/locks.
        index: wheels and source distributions that pip may find.
        cache: the command's cache directory.
    """

    locks: Path
    index: Path
    cache: Path

    def start(self, name: str = "demo", python: str = "3.13", *options: str) -> subprocess.Popen[str]:
        """Start the command; no index but the folder is within its reach."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PIP_")}
        environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.index)}
        script = [sys.executable, str(self.locks / "wheelhouse.py")]
        arguments = ["--name", name, "--python", python, "--cache", str(self.cache), *options]
        pipe = subprocess.PIPE
        return subprocess.Popen([*script, *arguments], env=environment, stdout=pipe, stderr=pipe, text=True)

    def run(self, name: str = "demo", python: str = "3.13", *options: str) -> tuple[int, str, list[str]]:
        """Run the command and return its exit code, stdout without the line's end, and the lines of stderr."""
        process = self.start(name, python, *options)
        out, err = process.communicate(timeout=120)
        return process.returncode, out.removesuffix("\n"), err.splitlines()

    def wheel(self, name: str, tag: str, files: dict[str, str]) -> Path:
        """Add a wheel of version 1.0 to the index and return its path.

        Each depends on a package that no lock names: a lock is complete, and nothing else may be fetched.
        """
        path = self.index / f"{name}-1.0-{tag}.whl"
        about = f"{name}-1.0.dist-info"
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: stranger\n"
        with zipfile.ZipFile(path, "w") as archive:
            for member, text in files.items():
                archive.writestr(member, text)
            archive.writestr(f"{about}/METADATA", metadata)
            archive.writestr(f"{about}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
            archive.writestr(f"{about}/RECORD", "")
        return path

    def source(self, name: str, setup_options: str = "") -> Path:
        """Add a source distribution of version 1.0 to the index and return its path."""
        folder = self.index.parent / f"{name}-1.0"
        folder.mkdir()
        (folder / f"{name}.py").write_text("ANSWER = 42\n")
        setup = f"from setuptools import Extension, setup\nsetup(name='{name}', version='1.0', {setup_options})\n"
        (folder / "setup.py").write_text(setup)
        path = self.index / f"{name}-1.0.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            archive.add(folder, folder.name)
        return path

    def lock(self, text: str) -> Path:
        """Write the lock ``demo`` for Python 3.13 and return the path that its archive has to get."""
        path = self.locks / "demo-py3.13.txt"
        path.write_text(text)
        return self.cache / "wheelhouse" / f"demo-py3.13-{digest(path)[:12]}.tar"

    def leftovers(self) -> list[Path]:
        """Return what a run must not leave behind: archives whole or partial, and work files."""
        return [path for folder in ("wheelhouse", "tmp") for path in (self.cache / folder).glob("**/*")]


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """A lab whose index holds a stand-in for uv, which every archive needs."""
    lab = Lab(locks=tmp_path / "locks", index=tmp_path / "index", cache=tmp_path / "cache")
    lab.locks.mkdir()
    lab.index.mkdir()
    shutil.copy(LOCKS / "wheelhouse.py", lab.locks)
    uv = lab.wheel("uv", "py3-none-musllinux_1_1_x86_64", {"uv-1.0.data/scripts/uv": "static uv"})
    (lab.locks / "controller.txt").write_text(f"uv==1.0 \\\n    --hash=sha256:{digest(uv)}\n")
    return lab


def test_archive_holds_exactly_what_the_lock_names(lab: Lab) -> None:
    # A wheel for the node's Python, one for another Python under the same hashes, and one that nobody asked for.
    native = lab.wheel("native", "cp313-cp313-manylinux_2_17_x86_64", {"native.py": ""})
    foreign = lab.wheel("native", "cp311-cp311-manylinux_2_17_x86_64", {"native.py": ""})
    pure = lab.wheel("pure", "py3-none-any", {"pure.py": ""})
    lab.wheel("stranger", "py3-none-any", {})
    archive = lab.lock(
        f"# a comment\npure==1.0 \\\n    --hash=sha256:{digest(pure)}\n    # via demo\n"
        f"native==1.0 \\\n    --hash=sha256:{digest(foreign)} \\\n    --hash=sha256:{digest(native)}\n"
    )
    assert lab.run()[:2] == (0, str(archive))
    with tarfile.open(archive) as tar:
        names = ["requirements.txt", "uv", f"wheels/{native.name}", f"wheels/{pure.name}"]
        assert tar.getnames() == names
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in tar.getmembers()} == {(0, 0, 0, "", "")}
        assert [m.mode for m in tar.getmembers()] == [0o644, 0o755, 0o644, 0o644]
        texts = [file.read() for file in map(tar.extractfile, names[:2]) if file]
    pinned = f"pure==1.0 --hash=sha256:{digest(pure)}\nnative==1.0 --hash=sha256:{digest(native)}\n"
    assert texts == [pinned.encode(), b"static uv"]


def test_same_lock_same_bytes_from_another_cache_and_umask(lab: Lab) -> None:
    source = lab.source("sourced", "py_modules=['sourced']")
    archive = lab.lock(f"--no-binary sourced\nsourced==1.0 --hash=sha256:{digest(source)}\n")
    assert lab.run()[0] == 0
    first = digest(archive)
    lab.cache = lab.cache.with_name("another-cache")
    umask = os.umask(0o077)
    try:
        code, path, _ = lab.run()
    finally:
        os.umask(umask)
    assert code == 0
    assert Path(path) != archive
    assert digest(Path(path)) == first


def test_source_is_built_once_and_listed_by_the_wheels_hash(lab: Lab) -> None:
    source = lab.source("sourced", "py_modules=['sourced']")
    text = f"--no-binary sourced\n--only-binary :all:\nsourced==1.0 --hash=sha256:{digest(source)}\n"
    lab.lock(text)
    code, path, progress = lab.run()
    assert code == 0
    assert any("building sourced" in line for line in progress)
    (built,) = (lab.cache / "wheels-built").glob("*/*.whl")
    with tarfile.open(path) as tar:
        file = tar.extractfile("requirements.txt")
        assert file is not None
        assert file.read().decode() == f"sourced==1.0 --hash=sha256:{digest(built)}\n"
    with zipfile.ZipFile(built) as wheel:
        assert {member.compress_type for member in wheel.infolist()} == {zipfile.ZIP_STORED}
        assert wheel.read("sourced.py") == b"ANSWER = 42\n"
    # Another lock that names the same source takes the built wheel: there is nothing left to build from.
    source.unlink()
    lab.lock(text + "# another lock\n")
    code, _, progress = lab.run()
    assert code == 0
    assert not any("building" in line for line in progress)


def test_wheel_bound_to_the_controller_is_refused(lab: Lab) -> None:
    source = lab.source("bound", "ext_modules=[Extension('bound', [], optional=True)]")
    lab.lock(f"--no-binary bound\nbound==1.0 --hash=sha256:{digest(source)}\n")
    code, out, progress = lab.run()
    assert (code, out) == (1, "")
    assert "built for the controller" in progress[-1]
    assert lab.leftovers() == []


def test_existing_archive_is_returned_at_once(lab: Lab) -> None:
    archive = lab.lock(f"missing==1.0 --hash=sha256:{'0' * 64}\n")
    archive.parent.mkdir(parents=True)
    archive.write_text("as it was")
    before = time.monotonic()
    assert lab.run() == (0, str(archive), [])
    # The promise is 0.2 s; the test machine may be busy.
    assert time.monotonic() - before < 1
    assert archive.read_text() == "as it was"


def test_unknown_lock(lab: Lab) -> None:
    code, out, lines = lab.run("nothing", "3.9")
    assert (code, out, len(lines)) == (2, "", 1)
    assert "nothing-py3.9.txt" in lines[0]
    assert not lab.cache.exists()


@pytest.mark.parametrize("entry", ["loose>=1.0", "hashless==1.0"])
def test_entry_without_version_or_hash_is_refused(lab: Lab, entry: str) -> None:
    lab.lock(f"{entry}\n")
    code, out, lines = lab.run()
    assert (code, out, len(lines)) == (2, "", 1)
    assert entry in lines[0]


def test_missing_package_leaves_no_archive(lab: Lab) -> None:
    # The first one exists: the failure comes when part of the work is done.
    pure = lab.wheel("pure", "py3-none-any", {})
    lab.lock(f"pure==1.0 --hash=sha256:{digest(pure)}\nno-such-package==1.0 --hash=sha256:{'0' * 64}\n")
    code, out, lines = lab.run()
    assert (code, out) == (1, "")
    assert "no-such-package" in lines[-1]
    assert not any("Traceback" in line for line in lines)
    assert lab.leftovers() == []


def test_full_disk_leaves_no_archive(lab: Lab) -> None:
    pure = lab.wheel("pure", "py3-none-any", {})
    lab.lock(f"pure==1.0 --hash=sha256:{digest(pure)}\n")
    # The wheels fit, the archive (10 KiB at least) does not.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        code, out, lines = lab.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (code, out) == (1, "")
    assert "packing" in lines[-2]
    assert "too large" in lines[-1]
    assert lab.leftovers() == []


def test_wrong_hash_is_refused(lab: Lab) -> None:
    lab.wheel("pure", "py3-none-any", {})
    lab.lock(f"pure==1.0 --hash=sha256:{'0' * 64}\n")
    assert lab.run()[:2] == (1, "")
    assert lab.leftovers() == []


def test_damaged_cache_entry_is_fetched_again(lab: Lab) -> None:
    pure = lab.wheel("pure", "py3-none-any", {})
    text = f"pure==1.0 --hash=sha256:{digest(pure)}\n"
    lab.lock(text)
    assert lab.run()[0] == 0
    cached = lab.cache / "wheels" / "py3.13" / pure.name
    cached.write_text("half a file")
    lab.lock(text + "# another lock\n")
    assert lab.run()[0] == 0
    assert digest(cached) == digest(pure)


def test_concurrent_runs_build_once(lab: Lab) -> None:
    source = lab.source("sourced", "py_modules=['sourced']")
    archive = lab.lock(f"--no-binary sourced\nsourced==1.0 --hash=sha256:{digest(source)}\n")
    processes = [lab.start() for _ in range(3)]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert [out for out, _ in results] == [f"{archive}\n"] * 3
    assert sum("building sourced" in err for _, err in results) == 1
    assert lab.leftovers() == [archive]


def test_a_project_is_packed_and_names_the_archive(lab: Lab, tmp_path: Path) -> None:
    pure = lab.wheel("pure", "py3-none-any", {})
    lab.lock(f"pure==1.0 --hash=sha256:{digest(pure)}\n")
    project = tmp_path / "project"
    (project / "tests").mkdir(parents=True)
    (project / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\n[project]\nname = "own"\nversion = "1.0"\n'
        '[tool.setuptools]\npy-modules = ["own"]\n'
    )
    (project / "own.py").write_text("ANSWER = 42\n")
    (project / "tests/test_own.py").write_text("")

    code, path, _ = lab.run("demo", "3.13", "--source", str(project))
    assert code == 0
    with tarfile.open(path) as tar:
        assert [name for name in tar.getnames() if "own-1.0" in name] == ["wheels/own-1.0-py3-none-any.whl"]
        pinned = tar.extractfile("requirements.txt")
        assert pinned is not None
        assert "own==1.0 --hash=sha256:" in pinned.read().decode()
    assert sorted(file.name for file in project.iterdir()) == ["own.py", "pyproject.toml", "tests"]

    (project / "tests/test_own.py").write_text("# no part of the wheel\n")
    assert lab.run("demo", "3.13", "--source", str(project))[1] == path
    (project / "own.py").write_text("ANSWER = 43\n")
    assert lab.run("demo", "3.13", "--source", str(project))[1] != path
