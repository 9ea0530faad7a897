#!/usr/bin/env bash
# Regenerates the paper's figures and tables:
#
#   scripts/reproduce.sh                                    every item, smoke scale: seconds each, no network
#   scripts/reproduce.sh --scale paper --data DIR fig11     one item at full scale
#   scripts/reproduce.sh --scale paper --record all         replaces the repository's own results and paper_figs/
#
# Results and images go to build/reproduce/SCALE; --help lists the rest. Plots need matplotlib; without it there are
# results only. Items whose data set is not in DIR (or $MII_HCACHE_DATA) are skipped and say what they need.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
if [ -z "${MII_HCACHE_PYTHON:-}" ]; then
    "$root/scripts/bootstrap.sh"
    venv="${MII_HCACHE_VENV:-$root/.venv}"
    case "$venv" in /*) ;; *) venv="$PWD/$venv" ;; esac
    MII_HCACHE_PYTHON="$venv/bin/python"
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$MII_HCACHE_PYTHON" -m experiments.common.runner "$@"
