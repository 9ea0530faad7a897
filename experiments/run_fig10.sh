#!/usr/bin/env bash
# fig10_leval: scripts/reproduce.sh fig10, with the same options.
exec "$(dirname "${BASH_SOURCE[0]}")/../scripts/reproduce.sh" "$@" fig10
