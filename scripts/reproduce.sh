#!/usr/bin/env bash
# Regenerates the paper's figures and tables:
#
#   scripts/reproduce.sh                                    every item, smoke scale: some minutes, no network
#   scripts/reproduce.sh --scale small --data DIR fig11     one item, with more of the real engine
#   scripts/reproduce.sh --scale small --record all         replaces the repository's own results and paper_figs/
#
# Results and images go to build/reproduce/SCALE; --help lists the rest. Items whose data set is not in DIR (or
# $MII_HCACHE_DATA) are skipped and say what they need. A run that was stopped goes on where it was.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
if [ -z "${MII_HCACHE_PYTHON:-}" ]; then
    "$root/scripts/bootstrap.sh" test # with matplotlib, and the client of the load generator
    venv="${MII_HCACHE_VENV:-$root/.venv}"
    case "$venv" in /*) ;; *) venv="$PWD/$venv" ;; esac
    MII_HCACHE_PYTHON="$venv/bin/python"
fi
exec "$MII_HCACHE_PYTHON" -m experiments.common.runner "$@"
