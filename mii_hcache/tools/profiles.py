"""Profiles by name or file: what a plan's costs come from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mii_hcache.core.cost import HardwareProfile, LayerCost, MeasuredProfile, custom_cost
from mii_hcache.core.geometry import ModelGeometry
from mii_hcache.core.platforms import PLATFORMS, platform_named
from mii_hcache.errors import ConfigError
from mii_hcache.storage.state_dir import PROFILE_FILE


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Costs of a layer, however they came about."""

    name: str
    description: str
    """Where the numbers come from."""
    basis: HardwareProfile | MeasuredProfile | LayerCost

    @property
    def tiers(self) -> tuple[str, ...]:
        """Storage tiers that it tells apart; the first one is the default."""
        if isinstance(self.basis, LayerCost):
            return ()
        tiers: Mapping[str, object] = (
            self.basis.read_bytes_per_s if isinstance(self.basis, HardwareProfile) else self.basis.tiers
        )
        return tuple(tiers)

    def layer_cost(self, geometry: ModelGeometry, tier: str | None) -> LayerCost:
        """Raises ConfigError for an unknown tier."""
        if isinstance(self.basis, HardwareProfile):
            return self.basis.layer_cost(geometry, tier)
        if isinstance(self.basis, MeasuredProfile):
            if self.basis.shape not in ("", geometry.shape):
                raise ConfigError(
                    f"profile {self.name} was measured for another model ({self.basis.shape}), its times would be "
                    f"wrong for this one ({geometry.shape}): measure it, `python -m mii_hcache profile --model ...`, "
                    f"or take one of {', '.join(PLATFORMS)}"
                )
            return self.basis.layer_cost(tier)
        if tier is not None:
            raise ConfigError(f"tier must not be given with a custom profile, which has one, got {tier!r}")
        return self.basis


def load_profile(name_or_path: str | None, state_dir: Path) -> Profile:
    """A platform that ships, a JSON file (measured or custom), or, for None, what was measured in `state_dir`.

    Raises ConfigError, which says what there is.
    """
    if name_or_path is None:
        path = state_dir / PROFILE_FILE
        if not path.is_file():
            raise ConfigError(
                f"profile must be given: this machine has not been measured ({path} does not exist). Measure it with "
                f"`python -m mii_hcache profile`, take one that ships: {', '.join(PLATFORMS)}; or write your own: "
                "a JSON file with the seconds that one layer takes for so many tokens, "
                '{"tokens": 1024, "io_hidden": ..., "io_kv": ..., "c_hidden": ..., "c_token": ...}'
            )
        return _read(path)
    if name_or_path in PLATFORMS:
        platform = platform_named(name_or_path)
        return Profile(name=platform.name, description=platform.source, basis=platform)
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        raise ConfigError(f"profile must be a JSON file or one of {', '.join(PLATFORMS)}, got {name_or_path!r}")
    return _read(path)


def _read(path: Path) -> Profile:
    try:
        text = path.read_text(encoding="utf-8")
        body = json.loads(text)
    except (OSError, ValueError) as error:
        raise ConfigError(f"profile {path} cannot be read: {error}") from error
    try:
        if isinstance(body, dict) and "tiers" in body:
            measured = MeasuredProfile.from_json(text)
            description = f"measured on {measured.machine}, {measured.date}, for model {measured.model[:16]}"
            return Profile(name=path.name, description=description, basis=measured)
        return Profile(name=path.name, description="written by hand", basis=custom_cost(text))
    except ConfigError as error:
        raise ConfigError(f"profile {path}: {error}") from None
