"""What a server imports. The process that servers are forked from imports it before all else."""

import tests.engine.parallel.forked  # noqa: F401
from mii_hcache.engine import measuring, open  # noqa: F401
from mii_hcache.serve import __main__, app, listening, loading, logs, loss, summary  # noqa: F401
