#!/usr/bin/env bash
# tab03_storage: scripts/reproduce.sh tab03, with the same options.
exec "$(dirname "${BASH_SOURCE[0]}")/../scripts/reproduce.sh" "$@" tab03
