"""Real servers for the tests: certificates of a CA of their own, PostgreSQL and Redis in private folders."""

import datetime
import os
import pwd
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID


def eventually(look: Callable[[], Any], patience_s: float = 10) -> Any:
    """What `look` returns, once that is true."""
    deadline = time.monotonic() + patience_s
    while not (found := look()):
        assert time.monotonic() < deadline, "did not come about"
        time.sleep(0.02)
    return found


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


# --- certificates ---


@dataclass
class Authority:
    """A CA that writes certificates for localhost and 127.0.0.1 into a folder."""

    folder: Path

    def __post_init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test CA")])
        constraints = x509.BasicConstraints(ca=True, path_length=None)
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        builder = self._builder(self._name, self._key.public_key()).add_extension(constraints, critical=True)
        certificate = builder.add_extension(usage, critical=True).sign(self._key, hashes.SHA256())
        self.ca = self.folder / "ca.crt"
        self.ca.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        self.certificate, self.key = self.folder / "node.crt", self.folder / "node.key"
        self.serial = self.issue()

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder().subject_name(subject).issuer_name(self._name).public_key(key)
            .serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
        )  # fmt: skip

    def issue(self) -> int:
        """Write a new certificate and key; return its serial number."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
        names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(IPv4Address("127.0.0.1"))])
        certificate = (
            self._builder(name, key.public_key()).add_extension(names, critical=False).sign(self._key, hashes.SHA256())
        )
        pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
        self.key.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
        self.certificate.write_bytes(certificate.public_bytes(pem))
        return certificate.serial_number


# --- PostgreSQL ---


def postgresql_programs() -> Path | None:
    """Return the folder of the newest PostgreSQL here."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    return found[-1].parent if found else None


class PostgresqlServer:
    """A member in a folder, started and stopped as a test likes. Its programs don't run as root, so neither do we."""

    ACCOUNT = "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name

    def __init__(self, folder: Path, programs: Path) -> None:
        self.folder, self._programs, self.port = folder, programs, 5432
        self.data, self._log = folder / "data", folder / "log"
        self.processes: list[int] = []
        if os.geteuid() == 0:
            shutil.chown(folder, self.ACCOUNT)

    def _do(self, program: str, *arguments: object) -> str:
        user = {"user": self.ACCOUNT, "group": self.ACCOUNT, "extra_groups": []} if os.geteuid() == 0 else {}
        command = [str(self._programs / program), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=60, **user)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def create(self) -> None:
        self._do("initdb", "--auth=trust", "--username=postgres", "--no-sync", "-D", self.data)

    def clone(self, primary: "PostgresqlServer") -> None:
        """Be a standby of the primary."""
        self._do(
            "pg_basebackup", "-h", primary.folder, "-U", "postgres", "-D", self.data, "-R", "--no-sync", "-c", "fast"
        )

    def start(self) -> None:
        options = f"-k {self.folder} -h '' -c fsync=off -c wal_level=replica -c hot_standby=on -c max_connections=20"
        # With its output to a file: pg_ctl would keep our pipe open.
        self._do("pg_ctl", "-D", self.data, "-l", self._log, "-o", options, "-w", "start")

    def stop(self, mode: str = "immediate") -> None:
        if (self.data / "postmaster.pid").exists():
            self._do("pg_ctl", "-D", self.data, "-m", mode, "-w", "stop")

    def sql(self, text: str) -> str:
        return self._do("psql", "-h", self.folder, "-U", "postgres", "-XAtq", "-c", text, "postgres").strip()


# --- Redis ---


class RedisServer:
    """A Redis on a port of 127.0.0.1 with TLS, and the user that the roles make for monitoring."""

    PASSWORD = "for-monitoring"

    def __init__(self, folder: Path, authority: Authority) -> None:
        self.port = free_port()
        (folder / "users.acl").write_text(
            "user default on nopass ~* &* +@all\n"
            f"user monitor on >{self.PASSWORD} -@all +@connection -@admin -@dangerous +info +role\n"
        )
        self._process = subprocess.Popen(
            ["redis-server", "--port", "0", "--tls-port", str(self.port), "--bind", "127.0.0.1", "--save", "",
             "--dir", str(folder), "--aclfile", str(folder / "users.acl"), "--tls-auth-clients", "no",
             "--tls-cert-file", str(authority.certificate), "--tls-key-file", str(authority.key),
             "--tls-ca-cert-file", str(authority.ca), "--tls-replication", "yes",
             "--repl-diskless-sync-delay", "0"],
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        self._cli = ["redis-cli", "-p", str(self.port), "--tls", "--cacert", str(authority.ca)]
        eventually(lambda: self.do("PING") == "PONG")

    def do(self, *words: str) -> str:
        return subprocess.run([*self._cli, *words], capture_output=True, text=True, timeout=10).stdout.strip()

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
