"""What is delivered, and what became of the deliveries of side_effect.yml."""

import json

RELEASES = "/opt/airflow/dags-releases"
DAGS = "/opt/airflow/dags"


def test_release_is_complete_and_nobody_but_root_writes_it(host):
    for name in ("xetra_daily_average.py", "pipelib/xetra.py", "spark/xetra_daily_average.py", ".airflowignore"):
        file = host.file(f"{DAGS}/{name}")
        assert file.is_file, name
        assert (file.user, file.group, file.mode) == ("root", "root", 0o644)
    for folder in ("/opt", "/opt/airflow", RELEASES, f"{DAGS}/pipelib"):
        assert (host.file(folder).user, host.file(folder).mode) == ("root", 0o755)


def test_settings_are_the_variables_of_the_last_delivery(host):
    settings = json.loads(host.file(f"{DAGS}/settings.json").content_string)["xetra"]
    assert settings["retries"] == 7, "side_effect.yml has not run"
    assert settings["landing_url"] == "file:///srv/landing/xetra"
    assert settings["storage_conn_id"] is None
    assert settings["max_reject_share"] == 0.01


def test_link_points_at_one_of_three_kept_releases(host):
    link = host.file(DAGS)
    assert link.is_symlink
    releases = host.file(RELEASES).listdir()
    assert len(releases) == 3
    assert link.linked_to.removeprefix(f"{RELEASES}/") in releases


def test_what_was_removed_or_refused_is_not_there(host):
    assert not host.file(f"{DAGS}/site_dag.py").exists
    assert host.run(f"grep -rl broken_dag {RELEASES}").stdout == ""


def test_staging_belongs_to_airflow(host):
    staging = host.file("/srv/landing/.staging")
    assert (staging.user, staging.group, staging.mode) == ("airflow", "airflow", 0o755)
    assert host.file("/srv/landing").user == "root"


def test_delivered_files_compile_on_the_node(host):
    script = "import ast, sys; [ast.parse(open(name).read()) for name in sys.argv[1:]]"
    done = host.run(f"find {DAGS}/ -name '*.py' -exec python3 -c '{script}' {{}} +")
    assert done.rc == 0, done.stderr
