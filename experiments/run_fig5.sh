#!/usr/bin/env bash
# fig05_pipeline: scripts/reproduce.sh fig05, with the same options.
exec "$(dirname "${BASH_SOURCE[0]}")/../scripts/reproduce.sh" "$@" fig05
