#!/usr/bin/env bash
# fig08_partition: scripts/reproduce.sh fig08, with the same options.
exec "$(dirname "${BASH_SOURCE[0]}")/../scripts/reproduce.sh" "$@" fig08
