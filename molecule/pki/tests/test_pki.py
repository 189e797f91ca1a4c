"""The certificate authority's work, as a node sees it."""

from scenario import SUBNET

TLS = "/etc/airflow-ha/tls"


def test_certificate_is_signed_by_the_authority(host):
    assert host.run(f"openssl verify -CAfile {TLS}/ca.crt {TLS}/node.crt").rc == 0


def test_certificate_names_the_node_loopback_and_nothing_foreign(host):
    names = host.run(f"openssl x509 -in {TLS}/node.crt -noout -ext subjectAltName").stdout
    for name in ("DNS:pki1", "DNS:localhost", "IP Address:127.0.0.1", f"IP Address:{SUBNET}.13"):
        assert name in names
    assert names.count("IP Address") == 2


def test_key_belongs_to_the_certificate(host):
    of_key = host.run(f"openssl pkey -in {TLS}/node.key -pubout").stdout
    of_cert = host.run(f"openssl x509 -in {TLS}/node.crt -noout -pubkey").stdout
    assert of_key == of_cert != ""


def test_keys_are_readable_by_the_group_only(host):
    for name in ("node.key", "node.pem"):
        file = host.file(f"{TLS}/{name}")
        assert (file.user, file.group, file.mode) == ("root", "airflow-tls", 0o640)


def test_authority_key_never_leaves_the_controller(host):
    assert host.run(f"ls {TLS}").stdout.split() == ["ca.crt", "node.crt", "node.key", "node.pem"]
