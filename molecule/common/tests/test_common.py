"""What every node has."""

import json

from scenario import SUBNET


def test_names_resolve_to_node_addresses(host):
    assert host.addr("common1").ipv4_addresses == [f"{SUBNET}.10"]


def test_time_is_kept_without_setting_the_clock(host):
    assert host.service("chrony").is_running
    assert host.service("chrony").is_enabled
    command_line = host.run("pgrep -a -o chronyd").stdout
    assert " -x" in command_line, command_line
    assert host.run("chronyc -n tracking").rc == 0


def test_limits_reach_new_services(host):
    shown = host.run("systemctl show --property=DefaultLimitNOFILE").stdout.strip()
    assert shown == "DefaultLimitNOFILE=65536"


def test_journal_is_bounded_and_persistent(host):
    assert host.file("/etc/systemd/journald.conf").contains("SystemMaxUse=1G")
    usage = host.run("journalctl --output=json --lines=1").stdout
    assert json.loads(usage)["_HOSTNAME"] == "common1"


def test_tls_group_exists_and_system_folders_kept_their_owner(host):
    assert host.group("airflow-tls").exists
    for folder in ("/etc", "/usr", "/etc/systemd"):
        assert host.file(folder).user == "root"
        assert host.file(folder).mode == 0o755
