#!/usr/bin/env bash
# fig06_order: scripts/reproduce.sh fig06, with the same options.
exec "$(dirname "${BASH_SOURCE[0]}")/../scripts/reproduce.sh" "$@" fig06
