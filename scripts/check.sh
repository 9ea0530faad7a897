#!/usr/bin/env bash
# Formatting, lint and types; nothing is changed. To mend what can be mended:
#
#   .venv/bin/ruff format . && .venv/bin/ruff check --fix .
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
"$root/scripts/bootstrap.sh" test
venv="${MII_HCACHE_VENV:-$root/.venv}"
case "$venv" in /*) ;; *) venv="$PWD/$venv" ;; esac
cd "$root"

status=0
check() {
    local start_s=$SECONDS
    if "$@"; then
        printf 'ok      %s (%d s)\n' "$(basename "$1") ${*:2}" $((SECONDS - start_s))
    else
        printf 'FAILED  %s\n' "$(basename "$1") ${*:2}"
        status=1
    fi
}
check "$venv/bin/ruff" format --quiet --check .
check "$venv/bin/ruff" check --quiet .
check "$venv/bin/mypy" --no-error-summary
mapfile -t native < <(find csrc -name '*.cpp' -o -name '*.hpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
if [ "${#native[@]}" -gt 0 ]; then
    if command -v clang-format >/dev/null 2>&1; then
        check clang-format --dry-run --Werror "${native[@]}"
    else
        echo "skipped clang-format: not installed"
    fi
fi
exit "$status"
