#!/usr/bin/env bash
# fleet: scripts/reproduce.sh fleet, with the same options.
exec "$(dirname "${BASH_SOURCE[0]}")/../scripts/reproduce.sh" "$@" fleet
