from __future__ import annotations

import json

import onegpu


def test_version(run) -> None:
    assert run("version").stdout.strip() == onegpu.__version__
    assert json.loads(run("version", "--json").stdout) == {"onegpu": onegpu.__version__}
