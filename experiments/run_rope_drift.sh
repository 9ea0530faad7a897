#!/usr/bin/env bash
# rope_drift: scripts/reproduce.sh rope_drift, with the same options.
exec "$(dirname "${BASH_SOURCE[0]}")/../scripts/reproduce.sh" "$@" rope_drift
