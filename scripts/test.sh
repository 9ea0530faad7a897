#!/usr/bin/env bash
# The whole suite: formatting, lint, types, then every test. With arguments only pytest runs, with these arguments:
#
#   scripts/test.sh
#   scripts/test.sh tests/storage -k catalog
#
# Needs no GPU, no compiler and, after the first use, no network. MII_HCACHE_TEST_WORKERS: processes that run tests side
# by side, as many as there are cores by default, 4 at most.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
"$root/scripts/bootstrap.sh" test
venv="${MII_HCACHE_VENV:-$root/.venv}"
case "$venv" in /*) ;; *) venv="$PWD/$venv" ;; esac

# models in tests are tiny and made on the spot: nothing may ask a hub, and one thread computes them fastest
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

if [ $# -gt 0 ]; then
    exec "$venv/bin/python" -m pytest "$@"
fi

cd "$root"
# whole files side by side: tests of one file share what is slow to make
workers="${MII_HCACHE_TEST_WORKERS:-$(env -u OMP_NUM_THREADS nproc 2>/dev/null || echo 2)}"  # nproc heeds that setting
[ "$workers" -le 4 ] || workers=4
run_pytest() { "$venv/bin/python" -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder "$@"; }
status=0
SECONDS=0
"$root/scripts/check.sh" || status=$?
check_s=$SECONDS
run_pytest || status=$?
# What keeps bytes once more, with the backend that needs no compiler and no io_uring; but not what asks for no backend,
# or for each of them by itself.
asked=(--ignore=tests/storage/gpu)
for name in copying disk_space format hostile io namespace namespace_health parts presence slots throttled transcripts turns; do
    asked+=("--ignore=tests/storage/test_$name.py")
done
MII_HCACHE_IO=threads run_pytest tests/storage tests/engine/test_restart.py "${asked[@]}" || status=$?
printf 'checks %d s, tests %d s: ' "$check_s" $((SECONDS - check_s))
if [ "$status" -eq 0 ]; then echo "all passed"; else echo "FAILED (exit status $status)"; fi
exit "$status"
