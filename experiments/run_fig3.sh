#!/usr/bin/env bash
# fig03_conversations: scripts/reproduce.sh fig03, with the same options.
exec "$(dirname "${BASH_SOURCE[0]}")/../scripts/reproduce.sh" "$@" fig03
