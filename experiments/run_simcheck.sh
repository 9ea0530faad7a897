#!/usr/bin/env bash
# simcheck: scripts/reproduce.sh simcheck, with the same options.
exec "$(dirname "${BASH_SOURCE[0]}")/../scripts/reproduce.sh" "$@" simcheck
