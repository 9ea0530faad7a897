#!/usr/bin/env bash
# fig13_schedule: scripts/reproduce.sh fig13, with the same options.
exec "$(dirname "${BASH_SOURCE[0]}")/../scripts/reproduce.sh" "$@" fig13
