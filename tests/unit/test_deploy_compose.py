"""The fleet of containers, as its file says it."""

from pathlib import Path

import yaml

COMPOSE = Path(__file__).parents[2] / "deploy" / "compose" / "compose.yaml"


def test_each_member_of_etcd_forgets_what_writes_have_replaced():
    services = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]
    members = [service["environment"] for name, service in services.items() if name.startswith("etcd")]
    assert len(members) == 3
    for settings in members:
        assert settings["ETCD_AUTO_COMPACTION_MODE"] == "periodic"
        assert settings["ETCD_AUTO_COMPACTION_RETENTION"] == "1h"
