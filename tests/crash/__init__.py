"""A campaign against the storage engine: processes that die, power cuts, damage, full and failing disks, for as long as
there is time. `python -m tests.crash --help`; tests/crash/test_*.py run a short slice of it."""
