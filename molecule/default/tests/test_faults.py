"""The fault suite has run as a side effect, on this lab: every case that docs/faults.md names, and each passed."""

from __future__ import annotations

from xml.etree import ElementTree

from cluster import LAB

# Case of docs/faults.md: the test that shows it.
CASES = {
    1: "test_a_killed_scheduler_is_replaced",
    5: "test_a_server_without_power_comes_back_as_standby",
    12: "test_a_killed_postmaster_comes_back_without_a_change_of_roles",
    13: "test_a_rack_with_the_primaries_is_gone",
    14: "test_switchover_there_and_back_under_load",
    15: "test_switchover_there_and_back_under_load",
    16: "test_refused_before_anything_changes",
    17: "test_a_promotion_by_hand_is_noticed_and_mended",
    18: "test_a_promotion_by_hand_is_noticed_and_mended",
    19: "test_a_hung_primary_is_replaced_and_comes_back",
    20: "test_switchover_while_tasks_are_queued_and_running",
    22: "test_a_run_that_is_killed_halfway_is_finished_by_the_next",
    23: "test_site_yml_changes_nothing_after_all_this",
    27: "test_a_rack_with_the_primaries_is_gone",
    28: "test_a_full_disk_costs_no_acknowledged_write",
}


def test_every_fault_case_was_run_and_passed():
    cases = ElementTree.parse(LAB / "faults.xml").getroot().findall(".//testcase")
    passed = {case.get("name") for case in cases if not {"failure", "error", "skipped"} & {child.tag for child in case}}
    assert {name for name in CASES.values() if name not in passed} == set()
    assert len(passed) == len(cases)
