"""What libraries say is written once, in our way, or not at all."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest

from mii_hcache.config import quiet_libraries

_SAY = """
import logging
from mii_hcache.serve.logs import set_up_logging
set_up_logging(verbose=False, as_json={as_json})
import huggingface_hub.utils
logging.getLogger("huggingface_hub.utils._http").warning("no route to the hub")
logging.getLogger("somebody").warning("chatter")
logging.getLogger("somebody").error("trouble")
"""


@pytest.mark.parametrize("as_json", [False, True])
def test_a_library_with_a_writer_of_its_own_is_heard_once(as_json):
    done = subprocess.run(
        [sys.executable, "-c", _SAY.format(as_json=as_json)], capture_output=True, text=True, timeout=60, check=True
    )
    lines = done.stderr.splitlines()
    assert len(lines) == 2 and not done.stdout
    if as_json:
        assert [json.loads(line)["message"] for line in lines] == ["no route to the hub", "trouble"]
    else:
        assert lines[0].endswith("WARNING huggingface_hub.utils._http: no route to the hub")


def test_quiet_libraries_say_only_what_is_wrong(monkeypatch):
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "error")
    log = logging.getLogger("DeepSpeed")
    monkeypatch.setattr(log, "filters", [])
    quiet_libraries()
    made = [log.makeRecord(log.name, level, "file", 1, "words", (), None) for level in (logging.WARNING, logging.ERROR)]
    assert [bool(log.filter(record)) for record in made] == [False, True]
