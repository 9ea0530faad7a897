#!/usr/bin/env bash
# fig02_transformer: scripts/reproduce.sh fig02, with the same options.
exec "$(dirname "${BASH_SOURCE[0]}")/../scripts/reproduce.sh" "$@" fig02
