#!/usr/bin/env bash
# fig09_sharegpt: scripts/reproduce.sh fig09, with the same options.
exec "$(dirname "${BASH_SOURCE[0]}")/../scripts/reproduce.sh" "$@" fig09
