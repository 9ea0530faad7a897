#!/usr/bin/env bash
# fig15_gpu_reuse: scripts/reproduce.sh fig15, with the same options.
exec "$(dirname "${BASH_SOURCE[0]}")/../scripts/reproduce.sh" "$@" fig15
