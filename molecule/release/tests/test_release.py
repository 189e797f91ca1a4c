"""A release stands beside others, complete and switched to by a link."""


def test_current_points_at_a_complete_release(host):
    current = host.file("/opt/spark/current")
    assert current.is_symlink
    assert host.file("/opt/spark/current/.complete").exists
    assert current.linked_to.startswith("/opt/spark/releases/")


def test_the_locked_package_is_importable(host):
    assert (
        host.run("/opt/spark/current/bin/python -c 'import pyspark; print(pyspark.__version__)'").stdout.strip()
        == "4.2.0"
    )


def test_no_wheels_are_left_behind(host):
    assert not host.file("/opt/spark/.wheelhouse").exists


def test_nothing_can_be_changed_by_other_users(host):
    assert host.run("find /opt/spark -perm /022 -not -type l").stdout == ""
