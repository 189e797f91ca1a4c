"""`make secrets`, run for real on a copy of an inventory."""

from __future__ import annotations

import base64
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ansible.parsing.vault import VaultLib, VaultSecret

PROJECT = Path(__file__).resolve().parents[2]
NAMES = list(yaml.safe_load((PROJECT / "files" / "secrets.template.yml").read_text()))


def make_secrets(folder: Path, env: str = "production") -> subprocess.CompletedProcess[str]:
    """What `make secrets` does, as talkative as it gets."""
    program = shutil.which("ansible-playbook", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    inventory = "inventories/production/hosts.yml"
    settings = {"ENV": env, "ANSIBLE_CONFIG": str(folder / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"}
    return subprocess.run(
        [str(program), "playbooks/secrets.yml", "-i", inventory, "--diff", "-vvv"],
        cwd=folder,
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def view(folder: Path) -> dict[str, str]:
    """The decrypted secrets."""
    inventory = folder / "inventories" / "production"
    password = VaultSecret((inventory / ".vault-password").read_bytes().strip())
    encrypted = (inventory / "group_vars" / "all" / "secrets.yml").read_bytes()
    secrets = yaml.safe_load(VaultLib([("default", password)]).decrypt(encrypted))
    assert isinstance(secrets, dict)
    return secrets


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the playbook needs, without any secret."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("ansible.cfg", "files/secrets.template.yml", "group_vars/all.yml", "playbooks/secrets.yml",
                 "playbooks/vault-password", "inventories/production/hosts.yml",
                 "inventories/production/group_vars/all/cluster.yml"):  # fmt: skip
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT / name, folder / name)
    (folder / "playbooks" / "group_vars").symlink_to("../group_vars")
    return folder


@pytest.fixture(scope="module")
def first_run(project: Path) -> subprocess.CompletedProcess[str]:
    """The run that generates everything."""
    done = make_secrets(project)
    assert done.returncode == 0, done.stdout
    return done


def test_every_secret_has_a_strong_value_of_its_own(project: Path, first_run: object) -> None:
    secrets = view(project)
    assert list(secrets) == NAMES
    assert len(set(secrets.values())) == len(NAMES)
    for name, value in secrets.items():
        if name.endswith("_fernet_key"):
            assert len(base64.urlsafe_b64decode(value)) == 32
        else:
            assert re.fullmatch(r"[A-Za-z0-9]{32,}", value)


def test_files_are_encrypted_and_private(project: Path, first_run: object) -> None:
    inventory = project / "inventories" / "production"
    encrypted = inventory / "group_vars" / "all" / "secrets.yml"
    assert encrypted.read_text().startswith("$ANSIBLE_VAULT;1.1;AES256\n")
    for path in (encrypted, inventory / ".vault-password"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_nothing_secret_is_printed(project: Path, first_run: subprocess.CompletedProcess[str]) -> None:
    password = (project / "inventories" / "production" / ".vault-password").read_text().strip()
    for secret in (password, *view(project).values()):
        assert secret not in first_run.stdout + first_run.stderr


def test_second_run_changes_nothing(project: Path, first_run: object) -> None:
    encrypted = project / "inventories" / "production" / "group_vars" / "all" / "secrets.yml"
    before = encrypted.read_bytes()
    done = make_secrets(project)
    assert done.returncode == 0, done.stdout
    assert " changed=0 " in done.stdout
    assert encrypted.read_bytes() == before


def test_new_names_are_added_and_old_values_kept(project: Path, first_run: object) -> None:
    before = view(project)
    with (project / "files" / "secrets.template.yml").open("a") as template:
        template.write("secret_of_a_later_release:\n")
    done = make_secrets(project)
    assert done.returncode == 0, done.stdout
    after = view(project)
    assert len(after.pop("secret_of_a_later_release")) >= 32
    assert after == before


def test_wrong_env_is_refused(project: Path, first_run: object) -> None:
    done = make_secrets(project, env="lab")
    assert done.returncode != 0


def test_a_lost_vault_password_is_not_replaced(project: Path, first_run: object) -> None:
    password = project / "inventories" / "production" / ".vault-password"
    kept = password.read_text()
    password.unlink()
    try:
        done = make_secrets(project)
        assert done.returncode != 0
        assert not password.exists()
        assert "Decryption failed" in done.stdout + done.stderr
    finally:
        password.write_text(kept)
        password.chmod(0o600)


def test_no_inventory_carries_secrets_in_the_clear() -> None:
    for path in (PROJECT / "inventories").rglob("*.yml"):
        text = path.read_text()
        if not text.startswith("$ANSIBLE_VAULT"):
            assert not re.search(r"^\s*secret_\w+: *[^\s{]", text, re.MULTILINE), path
