#!/usr/bin/env bash
# fig07_overview: scripts/reproduce.sh fig07, with the same options.
exec "$(dirname "${BASH_SOURCE[0]}")/../scripts/reproduce.sh" "$@" fig07
