#!/usr/bin/env bash
# exactness: scripts/reproduce.sh exactness, with the same options. MII_HCACHE_MODEL=DIR names a checkpoint of your own.
exec "$(dirname "${BASH_SOURCE[0]}")/../scripts/reproduce.sh" "$@" exactness
