"""The release of the DAGs: the same content is the same release, and what does not compile is refused."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
SCRIPT = PROJECT / "roles/dags/files/build_release.py"


def build(tmp_path, settings=None, folders=None):
    spec = {
        "folders": folders or [{"source": str(tmp_path / "dags"), "target": ""}],
        "settings": settings or {},
        "output": str(tmp_path / "out"),
    }
    return subprocess.run(
        [sys.executable, str(SCRIPT)], input=json.dumps(spec), text=True, capture_output=True, check=False
    )


def write(tmp_path, **files):
    for name, text in files.items():
        path = tmp_path / "dags" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def test_same_content_is_the_same_release(tmp_path):
    write(tmp_path, a="x = 1\n")
    first = json.loads(build(tmp_path).stdout)
    (tmp_path / "dags/__pycache__").mkdir()
    (tmp_path / "dags/__pycache__/a.pyc").touch()
    (tmp_path / "dags/.hidden").touch()
    assert json.loads(build(tmp_path).stdout) == first
    write(tmp_path, a="x = 2\n")
    assert json.loads(build(tmp_path).stdout)["hash"] != first["hash"]
    assert json.loads(build(tmp_path, {"retries": 1}).stdout)["hash"] != first["hash"]


def test_archive_ends_with_the_settings(tmp_path):
    write(tmp_path, a="x = 1\n")
    (tmp_path / "dags/.airflowignore").write_text("spark/\n")
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/job.py").write_text("y = 1\n")
    folders = [{"source": str(tmp_path / "dags"), "target": ""}, {"source": str(tmp_path / "jobs"), "target": "spark"}]
    archive = json.loads(build(tmp_path, {"retries": 1}, folders).stdout)["archive"]
    with tarfile.open(archive) as tar:
        assert tar.getnames() == ["spark", ".airflowignore", "a.py", "spark/job.py", "settings.json"]
        assert json.load(tar.extractfile("settings.json")) == {"retries": 1}
        assert {member.mode for member in tar if member.isfile()} == {0o644}


def test_broken_dags_are_refused_by_name(tmp_path):
    write(tmp_path, a="x = 1\n", b="def broken(:\n", c="y = 1\n\nx = = 2\n")
    done = build(tmp_path)
    assert done.returncode == 1
    assert not (tmp_path / "out").exists()
    assert [line.rsplit(":", 1)[0] for line in done.stderr.splitlines()] == ["b.py:1", "c.py:3"]


def test_a_missing_folder_is_named(tmp_path):
    done = build(tmp_path)
    assert done.returncode == 1
    assert done.stderr.strip() == f"{tmp_path}/dags: no such folder"


def test_the_projects_own_release_builds(tmp_path):
    folders = [
        {"source": f"{PROJECT}/files/dags", "target": ""},
        {"source": f"{PROJECT}/files/spark", "target": "spark"},
    ]
    done = build(tmp_path, {"xetra": {}}, folders)
    assert done.returncode == 0, done.stderr
