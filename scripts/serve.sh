#!/usr/bin/env bash
# The server. First use makes .venv and installs into it; later uses start in seconds.
#
#   scripts/serve.sh [options of python -m mii_hcache.serve; --help lists them]
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
"$root/scripts/bootstrap.sh" serve
exec "${MII_HCACHE_VENV:-$root/.venv}/bin/python" -m mii_hcache.serve "$@"
