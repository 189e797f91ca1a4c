"""When a certificate is issued again, and who is told."""

import datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from pki import actions_for, certificate_is_good, concatenate_files, subject_alternative_names

NAMES = ["DNS:node1", "IP:10.0.0.1"]


def make(
    folder: Path,
    name: str,
    *,
    names: list[str],
    days: int,
    issuer: tuple[x509.Name, ec.EllipticCurvePrivateKey] | None = None,
):
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer[0] if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName([general_name(item) for item in names]), critical=False)
    )
    certificate = builder.sign(issuer[1] if issuer else key, hashes.SHA256())
    (folder / f"{name}.crt").write_bytes(certificate.public_bytes(Encoding.PEM))
    (folder / f"{name}.key").write_text("present")
    return subject, key


def general_name(item: str) -> x509.GeneralName:
    import ipaddress

    kind, value = item.split(":", 1)
    return x509.DNSName(value) if kind == "DNS" else x509.IPAddress(ipaddress.ip_address(value))


@pytest.fixture
def authority(tmp_path: Path):
    return make(tmp_path, "ca", names=["DNS:ca"], days=1000)


def good(folder: Path, names: list[str] = NAMES) -> bool:
    return certificate_is_good(str(folder / "node1.crt"), str(folder / "ca.crt"), names, 90)


def test_a_fresh_certificate_is_good(tmp_path, authority):
    make(tmp_path, "node1", names=NAMES, days=100, issuer=authority)
    assert good(tmp_path)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder, authority: None,
        lambda folder, authority: make(folder, "node1", names=NAMES, days=89, issuer=authority),
        lambda folder, authority: make(folder, "node1", names=NAMES[:1], days=100, issuer=authority),
        lambda folder, authority: make(folder, "node1", names=[*NAMES, "DNS:more"], days=100, issuer=authority),
        lambda folder, authority: make(folder, "node1", names=NAMES, days=100),
        lambda folder, authority: (
            make(folder, "node1", names=NAMES, days=100, issuer=authority) and (folder / "node1.key").unlink()
        ),
    ],
    ids=["missing", "ends soon", "lacks a name", "has a name too many", "signed by another", "without its key"],
)
def test_anything_else_is_issued_again(tmp_path, authority, spoil):
    spoil(tmp_path, authority)
    assert not good(tmp_path)


def test_names_are_typed_sorted_and_unique():
    assert subject_alternative_names(["b", "10.0.0.1", "a", "", "b", "::1"]) == [
        "DNS:a",
        "DNS:b",
        "IP:10.0.0.1",
        "IP:::1",
    ]


def test_only_running_users_of_the_certificate_are_told():
    services = {
        "haproxy.service": {"state": "running"},
        "redis-server.service": {"state": "stopped"},
        "postgresql@17-main.service": {"state": "running"},
        "ssh.service": {"state": "running"},
    }
    users = [
        {"unit": r"^haproxy\.service$", "state": "reloaded"},
        {"unit": r"^redis-server\.service$", "state": "restarted"},
        {"unit": r"^postgresql@.*\.service$", "state": "reloaded"},
    ]
    assert actions_for(services, users) == [
        {"unit": "haproxy.service", "state": "reloaded"},
        {"unit": "postgresql@17-main.service", "state": "reloaded"},
    ]


def test_files_are_joined_in_order(tmp_path):
    (tmp_path / "a").write_text("1\n")
    (tmp_path / "b").write_text("2\n")
    assert concatenate_files([str(tmp_path / "b"), str(tmp_path / "a")]) == "2\n1\n"
