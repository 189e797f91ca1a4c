"""Who is primary: decided from what the members say, never from the inventory once deployed."""

import pytest
from ansible.errors import AnsibleFilterError
from cluster_state import cluster_state_answers, elect_primary

MEMBERS = ["data1", "data2"]


@pytest.mark.parametrize(
    ("answers", "deployed", "expected"),
    [
        ({}, [], "data1"),
        ({"data2": "primary"}, [], "data2"),
        ({"data1": "primary", "data2": "primary"}, [], "data1"),
        ({"data1": "primary", "data2": "standby"}, MEMBERS, "data1"),
        ({"data1": "standby", "data2": "primary"}, MEMBERS, "data2"),
        ({"data2": "primary"}, ["data2"], "data2"),
    ],
)
def test_one_primary(answers, deployed, expected):
    assert elect_primary(MEMBERS, answers, deployed, "postgresql") == expected


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ({"data1": "primary", "data2": "primary"}, "postgresql has 2 primaries (data1: primary, data2: primary)"),
        ({"data2": "standby"}, "postgresql has no primary (data1: no answer, data2: standby)"),
        ({}, "postgresql has no primary (data1: no answer, data2: no answer)"),
    ],
)
def test_disagreement_stops_with_one_line(answers, message):
    with pytest.raises(AnsibleFilterError) as caught:
        elect_primary(MEMBERS, answers, ["data1"], "postgresql")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_answers_speak_one_language():
    results = [
        {"item": "a", "rc": 0, "stdout_lines": ["OK", "master", "123"]},
        {"item": "b", "rc": 0, "stdout_lines": ["slave"]},
        {"item": "c", "rc": 0, "stdout_lines": ["standby"]},
        {"item": "d", "rc": 1, "stdout_lines": ["primary"]},
        {"item": "e", "rc": 0, "stdout_lines": ["NOAUTH Authentication required."]},
        {"item": "f", "rc": 0, "stdout_lines": []},
        {"item": "g", "rc": 2, "stderr": "FATAL:  not accepting connections\nDETAIL:  Hot standby mode is disabled."},
    ]
    found = cluster_state_answers(results)
    assert found == {"a": "primary", "b": "standby", "c": "standby", "e": "", "f": "", "g": "standby"}
