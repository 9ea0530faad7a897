#!/usr/bin/env bash
# tab02_platforms: scripts/reproduce.sh tab02, with the same options.
exec "$(dirname "${BASH_SOURCE[0]}")/../scripts/reproduce.sh" "$@" tab02
