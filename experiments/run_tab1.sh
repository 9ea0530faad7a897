#!/usr/bin/env bash
# tab01_leval: scripts/reproduce.sh tab01, with the same options.
exec "$(dirname "${BASH_SOURCE[0]}")/../scripts/reproduce.sh" "$@" tab01
