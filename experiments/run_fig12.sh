#!/usr/bin/env bash
# fig12_ablation: scripts/reproduce.sh fig12, with the same options.
exec "$(dirname "${BASH_SOURCE[0]}")/../scripts/reproduce.sh" "$@" fig12
