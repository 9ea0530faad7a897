#!/usr/bin/env bash
# fig11_sensitivity: scripts/reproduce.sh fig11, with the same options.
exec "$(dirname "${BASH_SOURCE[0]}")/../scripts/reproduce.sh" "$@" fig11
