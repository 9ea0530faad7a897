#!/usr/bin/env bash
# fig01_methods: scripts/reproduce.sh fig01, with the same options.
exec "$(dirname "${BASH_SOURCE[0]}")/../scripts/reproduce.sh" "$@" fig01
