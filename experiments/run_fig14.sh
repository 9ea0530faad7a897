#!/usr/bin/env bash
# fig14_saving: scripts/reproduce.sh fig14, with the same options.
exec "$(dirname "${BASH_SOURCE[0]}")/../scripts/reproduce.sh" "$@" fig14
