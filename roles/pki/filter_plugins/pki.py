"""Tells whether a node's certificate has to be issued again, without starting a process for it."""

from __future__ import annotations

import datetime
import ipaddress
import re
from collections.abc import Callable
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature


def subject_alternative_names(names: list[str]) -> list[str]:
    """Names and addresses as OpenSSL writes them (`DNS:…`, `IP:…`), sorted and without repetition."""
    return sorted({f"{'IP' if _is_address(name) else 'DNS'}:{name}" for name in names if name})


def certificate_is_good(path: str, ca_path: str, names: list[str], renew_days: int) -> bool:
    """True when the certificate and its key are there and need no new issue.

    path: the certificate; its key lies beside it with the ending `.key`. ca_path: the CA's certificate, which
    must have signed it. names: what subject_alternative_names() made of the wanted names, all of which it must hold
    and no others. renew_days: the least remaining validity, in days. Raises ValueError for a damaged file.
    """
    certificate_file, ca_file = Path(path), Path(ca_path)
    if not (certificate_file.exists() and ca_file.exists() and certificate_file.with_suffix(".key").exists()):
        return False
    certificate = x509.load_pem_x509_certificate(certificate_file.read_bytes())
    try:
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(ca_file.read_bytes()))
    except (InvalidSignature, ValueError):
        return False
    left = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    return left > datetime.timedelta(days=renew_days) and _names_of(certificate) == names


def concatenate_files(paths: list[str]) -> str:
    """The contents of the files, one after the other. Raises FileNotFoundError."""
    return "".join(Path(path).read_text() for path in paths)


def actions_for(services: dict[str, dict[str, str]], users: list[dict[str, str]]) -> list[dict[str, str]]:
    """What to do with which running service, as `{"unit", "state"}`, for a new certificate.

    services: as ansible.builtin.service_facts reports them. users: a regular expression per kind of service
    (`unit`) and the state that systemd_service has to bring about (`state`).
    """
    return [
        {"unit": name, "state": user["state"]}
        for name, service in sorted(services.items())
        for user in users
        if service.get("state") == "running" and re.search(user["unit"], name)
    ]


def _names_of(certificate: x509.Certificate) -> list[str]:
    extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    addresses = [f"IP:{address}" for address in extension.get_values_for_type(x509.IPAddress)]
    return sorted(addresses + [f"DNS:{name}" for name in extension.get_values_for_type(x509.DNSName)])


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class FilterModule:
    """Ansible's entry point."""

    def filters(self) -> dict[str, Callable[..., object]]:
        """Names of the filters and the functions behind them."""
        return {
            "actions_for": actions_for,
            "certificate_is_good": certificate_is_good,
            "concatenate_files": concatenate_files,
            "subject_alternative_names": subject_alternative_names,
        }
