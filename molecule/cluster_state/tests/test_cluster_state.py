"""On bare machines the inventory's first member is to become the primary."""

import json


def test_first_member_is_taken_on_a_first_deployment(host):
    found = json.loads(host.file("/root/cluster_state.json").content_string)
    assert found == {"primary": ["state1"], "standby": []}
