#!/usr/bin/env bash
# fig04_overhead: scripts/reproduce.sh fig04, with the same options.
exec "$(dirname "${BASH_SOURCE[0]}")/../scripts/reproduce.sh" "$@" fig04
