"""What the role computes about passwords and addresses."""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
from collections.abc import Callable

from ansible.errors import AnsibleFilterError

_ITERATIONS = 4096
_SALT_BYTES = 16


def scram_verifier(password: str, user: str) -> str:
    """The SCRAM-SHA-256 verifier that PostgreSQL stores, so that it never gets to see the password itself.

    The salt is derived from password and user instead of drawn, for the same input must give the same verifier on
    every run; it still differs between users and between clusters, whose passwords differ. Raises AnsibleFilterError
    for an empty password or one that is not ASCII, which PostgreSQL would normalise before hashing.
    """
    if not password or not password.isascii():
        raise AnsibleFilterError(f"the password of PostgreSQL's role '{user}' must be non-empty ASCII")
    secret = password.encode()
    salt = hmac.digest(secret, b"salt of " + user.encode(), "sha256")[:_SALT_BYTES]
    salted = hashlib.pbkdf2_hmac("sha256", secret, salt, _ITERATIONS)
    stored_key = hashlib.sha256(hmac.digest(salted, b"Client Key", "sha256")).digest()
    server_key = hmac.digest(salted, b"Server Key", "sha256")
    encoded = (base64.b64encode(part).decode() for part in (salt, stored_key, server_key))
    return "SCRAM-SHA-256${}:{}${}:{}".format(_ITERATIONS, *encoded)


def pgpass_field(value: str) -> str:
    """A value as a field of a password file, in which a colon separates fields."""
    return value.replace("\\", "\\\\").replace(":", "\\:")


def hba_address(address: str) -> str:
    """An address as pg_hba.conf wants it: with its full mask, or a host name as it is."""
    try:
        return str(ipaddress.ip_network(address))
    except ValueError:
        return address


class FilterModule:
    """Ansible's entry point."""

    def filters(self) -> dict[str, Callable[..., object]]:
        """Names of the filters and the functions behind them."""
        return {"scram_verifier": scram_verifier, "pgpass_field": pgpass_field, "hba_address": hba_address}
