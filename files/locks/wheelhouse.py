"""Pack a lock's wheels into one archive that a node without an index can install from.

    python files/locks/wheelhouse.py --name airflow --python 3.13

prints the path of ``.cache/wheelhouse/airflow-py3.13-<hash>.tar``, where ``<hash>`` is the beginning of the lock
file's SHA-256, and builds the archive when it is not there yet. With ``--source FOLDER`` the project in that folder is
packed too, and the hash is one of the lock and of the project's files. On the node, in the unpacked archive:

    ./uv venv --python /usr/bin/python3 TARGET
    ./uv pip sync --python TARGET --no-index --find-links wheels --require-hashes --compile-bytecode requirements.txt

What is below the cache directory:

    wheelhouse/     the archives
    wheels/         fetched wheels, one folder per target, checked against the lock's hashes before every use
    wheels-built/   wheels built from source distributions, one folder per locked requirement
    locks/, tmp/    locks between concurrent runs, and work directories

Nothing is ever pruned: the whole cache may be deleted at any time that no run is under way.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

LOCKS = Path(__file__).resolve().parent
HASH_DIGITS = 12

# The locks are resolved for x86_64 and glibc 2.28 (compile.sh); a wheel for any older glibc runs there as well.
# The names of PEP 513, 571 and 599 are spelled out because pip does not derive them from the newer ones.
NODE_PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(28, 4, -1)] + [
    f"manylinux{alias}_x86_64" for alias in ("2014", "2010", "1")
]
# The musl build of uv is linked statically; the glibc one needs libgcc, which a minimal node may lack.
UV_PLATFORMS = ["musllinux_1_1_x86_64"]

# pip fetches one file after another, so several run side by side. With 200 wheels and two cores, 8 were no faster.
FETCHERS = 4

# 1980-01-01T00:00:00Z, the oldest time a zip file can hold.
BUILD_EPOCH = "315532800"


class WheelhouseError(Exception):
    """A failure to report in one line.

    Attributes:
        code: exit code of the command: 2 for a request that cannot be met, 1 for one that failed.
    """

    def __init__(self, message: str, code: int = 1) -> None:
        """Keep the message (one line, for people) and the exit code."""
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Requirement:
    """One pinned distribution of a lock.

    Attributes:
        name: distribution name, spelled as in the lock.
        version: the exact version.
        hashes: hexadecimal SHA-256 digests of the files that may be used.
    """

    name: str
    version: str
    hashes: frozenset[str]

    def line(self) -> str:
        """Return the requirement as one line of a requirements file, without the line's end."""
        return " ".join([f"{self.name}=={self.version}", *(f"--hash=sha256:{h}" for h in sorted(self.hashes))])


@dataclass(frozen=True)
class Lock:
    """What a lock file says.

    Attributes:
        requirements: the pinned distributions, in the file's order.
        from_source: names of those that have to be built from their source distribution (``--no-binary``).
    """

    requirements: tuple[Requirement, ...]
    from_source: frozenset[str]


def say(message: str) -> None:
    """Report progress on stderr; stdout belongs to the result."""
    print(f"wheelhouse: {message}", file=sys.stderr, flush=True)


def sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 digest of a file.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def source_files(folder: Path) -> list[Path]:
    """Return the files of a project that its wheel can depend on, in a fixed order: no tests, no caches."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    skipped = {"tests", "__pycache__", "build"}
    return [
        path
        for path in found
        if not any(part in skipped or part.startswith(".") or part.endswith(".egg-info")
                   for part in path.relative_to(folder).parts)
    ]  # fmt: skip


def release_hash(lock: Path, source: Path | None = None) -> str:
    """Return the beginning of a hash that names what is installed: a lock's, and a project's files on top of it.

    Raises:
        OSError: a file cannot be read.
    """
    if source is None:
        return sha256(lock)[:HASH_DIGITS]
    listing = "".join(f"{sha256(path)}  {path.relative_to(source)}\n" for path in source_files(source))
    return hashlib.sha256(f"{sha256(lock)}\n{listing}".encode()).hexdigest()[:HASH_DIGITS]


def read_lock(path: Path) -> Lock:
    """Read a lock written by compile.sh.

    Environment markers are ignored: a node's lock is resolved for one platform and has none.

    Raises:
        WheelhouseError: an entry is not pinned or has no hash (exit code 2).
        OSError: the file cannot be read.
    """
    requirements = []
    from_source = set()
    for line in path.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
        words = line.partition("#")[0].split()
        if not words or words[0] == "--only-binary":
            continue
        if words[0] == "--no-binary":
            from_source.add(words[1])
            continue
        name, equals, version = words[0].partition("==")
        hashes = frozenset(word.removeprefix("--hash=sha256:") for word in words if word.startswith("--hash=sha256:"))
        if not (equals and hashes):
            raise WheelhouseError(f"{path.name}: {words[0]} is not pinned by version and sha256", code=2)
        requirements.append(Requirement(name, version, hashes))
    return Lock(tuple(requirements), frozenset(from_source))


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes; wait for it as long as it takes.

    Raises:
        OSError: the lock file cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def publish(source: Path, target: Path) -> None:
    """Move a finished file to its final name on the same file system, so that the name never shows half of it.

    The data reach the disk first: after a loss of power an existing name would otherwise pass for a complete file.

    Raises:
        OSError: the disk is full, or the two names are on different file systems.
    """
    with source.open("rb") as file:
        os.fsync(file.fileno())
    target.parent.mkdir(parents=True, exist_ok=True)
    source.replace(target)


def pip(arguments: Sequence[str], work: Path) -> None:
    """Run the pip of this Python's environment, without dependencies.

    pip finds its index where it always does (pip.conf, PIP_INDEX_URL); callers have whatever it finds checked by hash.

    Args:
        arguments: sub-command and options.
        work: directory for temporary files; it has to hold an unpacked source distribution twice.

    Raises:
        WheelhouseError: pip failed; the message is pip's last error.
    """
    # -I: neither the current directory nor PYTHON* variables decide which pip this is.
    command = [sys.executable, "-I", "-m", "pip", *arguments]
    command += ["--quiet", "--no-input", "--no-cache-dir", "--no-deps", "--retries=2"]
    environment = {**os.environ, "TMPDIR": str(work), "SOURCE_DATE_EPOCH": BUILD_EPOCH}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        lines = [line.strip() for line in run.stderr.splitlines() if line.strip()]
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
        reason = (errors or lines or [f"exit code {run.returncode}"])[-1]
        network = "the package index does not answer; " if "Retrying (" in run.stderr else ""
        raise WheelhouseError(f"{network}pip: {reason}")


def fetch(
    requirements: Sequence[Requirement], target: Sequence[str], store: Path, work: Path
) -> dict[Requirement, Path]:
    """Return one wheel for each requirement, fetching those that the store does not hold.

    Args:
        requirements: what to fetch.
        target: pip's options for the Python and the platforms that the wheels are for.
        store: directory of wheels fetched earlier for the same target.
        work: directory for temporary files, on the store's file system.

    Raises:
        WheelhouseError: a wheel does not exist, does not match its hashes, or cannot be fetched.
        OSError: the store cannot be written.
    """
    store.mkdir(parents=True, exist_ok=True)
    digests = {sha256(path): path for path in sorted(store.glob("*.whl"))}
    missing = [requirement for requirement in requirements if requirement.hashes.isdisjoint(digests)]
    if missing:
        say(f"fetching {len(missing)} of {len(requirements)} wheels")

    def fetch_share(number: int) -> None:
        share = missing[number::FETCHERS]
        if share:
            listing = work / f"fetch-{number}.txt"
            listing.write_text("".join(f"{requirement.line()}\n" for requirement in share), encoding="utf-8")
            options = ["--only-binary=:all:", "--require-hashes", *target, "--dest", str(work / "fetched")]
            pip(["download", *options, "--requirement", str(listing)], work)

    with ThreadPoolExecutor(FETCHERS) as pool:
        # list() because an error shows only when its result is asked for.
        list(pool.map(fetch_share, range(FETCHERS)))

    for path in sorted((work / "fetched").glob("*.whl")):
        digest = sha256(path)
        digests[digest] = path.replace(store / path.name)
    return {requirement: digests[min(requirement.hashes & digests.keys())] for requirement in requirements}


def build(requirement: Requirement, cache: Path, work: Path) -> Path:
    """Return the wheel of a source distribution, building it when the cache does not hold it.

    Only wheels for every Python and platform are accepted, since the controller's Python need not be the node's.

    Args:
        requirement: what to build; its hashes are those of the source distribution.
        cache: the cache directory.
        work: directory for temporary files, below the cache directory.

    Raises:
        WheelhouseError: the source cannot be fetched or built, or the wheel is bound to a platform.
        OSError: the cache cannot be written.
    """
    # The folder's name is a hash of name, version and hashes: another source means another wheel.
    key = hashlib.sha256(requirement.line().encode()).hexdigest()[:HASH_DIGITS]
    store = cache / "wheels-built" / key
    with locked(cache / "locks" / f"{key}.lock"):
        for path in store.glob("*.whl"):
            return path
        say(f"building {requirement.name} {requirement.version}")
        listing = work / f"build-{key}.txt"
        # Stored, not deflated: jars are compressed already, and deflating 490 MB again takes longer than all the rest.
        # The setting stands in the file because pip's command line does not reach requirements read from a file.
        setting = '--config-settings="--build-option=--compression=stored"'
        listing.write_text(f"{requirement.line()} {setting}\n", encoding="utf-8")
        # Without build isolation, setuptools is the locked one of the controller's environment.
        options = ["--no-binary=:all:", "--no-build-isolation", "--require-hashes"]
        pip(["wheel", *options, "--wheel-dir", str(work / key), "--requirement", str(listing)], work)
        (wheel,) = (work / key).glob("*.whl")
        if not wheel.name.endswith("-none-any.whl"):
            raise WheelhouseError(f"{wheel.name} was built for the controller, not for the node")
        publish(wheel, store / wheel.name)
        return store / wheel.name


def build_project(source: Path, work: Path) -> dict[Requirement, Path]:
    """Return the wheel of a project in this repository.

    Args:
        source: the project's folder, with a pyproject.toml.
        work: directory for temporary files.

    Raises:
        WheelhouseError: the project cannot be built, or its wheel is bound to a platform.
        OSError: a file cannot be read or copied.
    """
    say(f"building {source.name}")
    # From a copy: setuptools leaves its own files beside the sources.
    for path in source_files(source):
        copy = work / "project" / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    pip(["wheel", "--no-build-isolation", "--wheel-dir", str(work / "built"), str(work / "project")], work)
    (wheel,) = (work / "built").glob("*.whl")
    if not wheel.name.endswith("-none-any.whl"):
        raise WheelhouseError(f"{wheel.name} was built for the controller, not for the node")
    name, version, *_ = wheel.name.split("-")
    return {Requirement(name, version, frozenset([sha256(wheel)])): wheel}


def uv_binary(cache: Path, work: Path) -> bytes:
    """Return the statically linked uv for the nodes, in the version and with the hash of controller.txt.

    Raises:
        WheelhouseError: controller.txt does not pin uv, or its wheel cannot be fetched.
        OSError: the cache cannot be written.
    """
    uv = [r for r in read_lock(LOCKS / "controller.txt").requirements if r.name == "uv"]
    if not uv:
        raise WheelhouseError("controller.txt does not pin uv", code=2)
    target = [f"--platform={platform}" for platform in UV_PLATFORMS]
    (wheel,) = fetch(uv, target, cache / "wheels" / "uv", work).values()
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(f"uv-{uv[0].version}.data/scripts/uv")


def pack(archive: Path, wheels: dict[Requirement, Path], uv: bytes) -> None:
    """Write the archive: requirements.txt, uv and the wheels, the same bytes for the same input.

    Args:
        archive: file to write.
        wheels: the wheel to install for each requirement.
        uv: the installer's program file.

    Raises:
        OSError: the archive cannot be written.
    """
    # One hash each, that of the wheel in the archive: for a built wheel the lock knows only the source's hash.
    pins = (Requirement(r.name, r.version, frozenset([sha256(path)])) for r, path in wheels.items())
    requirements = "".join(f"{pin.line()}\n" for pin in pins)
    # Not compressed: the members are.
    with tarfile.open(archive, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data, mode in (("requirements.txt", requirements.encode(), 0o644), ("uv", uv, 0o755)):
            # A new TarInfo has time 0, owner and group 0.
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), mode
            tar.addfile(entry, io.BytesIO(data))
        for path in sorted(wheels.values(), key=lambda path: path.name):
            entry = tarfile.TarInfo(f"wheels/{path.name}")
            entry.size, entry.mode = path.stat().st_size, 0o644
            with path.open("rb") as file:
                tar.addfile(entry, file)


def wheelhouse(name: str, python: str, cache: Path, project: Path | None = None) -> Path:
    """Return the archive of a lock, building it when it does not exist.

    Args:
        name: lock name: ``airflow``, ``spark`` or ``watchdog``.
        python: the node's Python as ``major.minor``.
        cache: the cache directory; made when it does not exist.
        project: folder of a project of this repository whose wheel is packed too.

    Raises:
        WheelhouseError: there is no such lock (exit code 2), or a wheel cannot be fetched or built (exit code 1).
        OSError: the cache cannot be written.
    """
    source = LOCKS / f"{name}-py{python}.txt"
    if not source.is_file():
        raise WheelhouseError(f"there is no lock {source.name} in files/locks", code=2)
    stem = f"{name}-py{python}-{release_hash(source, project)}"
    archive = cache / "wheelhouse" / f"{stem}.tar"
    with locked(cache / "locks" / f"{stem}.lock"):
        # From an earlier run, or from one that this run has just waited for.
        if archive.exists():
            return archive
        lock = read_lock(source)
        (cache / "tmp").mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{stem}-", dir=cache / "tmp") as directory:
            work = Path(directory)
            target = ["--implementation=cp", f"--python-version={python}", f"--abi=cp{python.replace('.', '')}"]
            target += [f"--platform={platform}" for platform in NODE_PLATFORMS]
            binary = [r for r in lock.requirements if r.name not in lock.from_source]
            wheels = fetch(binary, target, cache / "wheels" / f"py{python}", work)
            wheels |= {r: build(r, cache, work) for r in lock.requirements if r.name in lock.from_source}
            if project is not None:
                wheels |= build_project(project, work)
            uv = uv_binary(cache, work)
            say(f"packing {len(wheels)} wheels")
            pack(work / archive.name, wheels, uv)
            publish(work / archive.name, archive)
    return archive


def main() -> int:
    """Run the command and return its exit code: 0, 1 after a failure, 2 for a lock that does not exist."""
    parser = argparse.ArgumentParser(description="Pack a lock's wheels into one archive and print its path.")
    parser.add_argument("--name", required=True, help="lock name: airflow, spark or watchdog")
    parser.add_argument("--python", required=True, help="the node's Python as major.minor, such as 3.13")
    parser.add_argument("--cache", type=Path, default=Path(".cache"), help="cache directory (default: %(default)s)")
    parser.add_argument("--source", type=Path, help="folder of a project whose wheel is packed too")
    arguments = parser.parse_args()
    # Built wheels record the modes of their files, which must not depend on the caller.
    os.umask(0o022)
    try:
        print(wheelhouse(arguments.name, arguments.python, arguments.cache.absolute(), arguments.source))
    except WheelhouseError as error:
        say(str(error))
        return error.code
    except OSError as error:
        say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
