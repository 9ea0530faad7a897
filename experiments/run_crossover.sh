#!/usr/bin/env bash
# crossover: scripts/reproduce.sh crossover, with the same options.
exec "$(dirname "${BASH_SOURCE[0]}")/../scripts/reproduce.sh" "$@" crossover
