"""mii_hcache: conversations come back fast. HCache (EuroSys '25) on DeepSpeed-MII.

The names below are loaded when they are first used, so that `import mii_hcache` needs neither torch nor an engine.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mii_hcache.config import HCacheConfig
    from mii_hcache.engine.attached import attach
    from mii_hcache.engine.pipeline import pipeline

__version__ = "0.1.0"

__all__ = ["HCacheConfig", "__version__", "attach", "pipeline"]

_HOMES = {
    "HCacheConfig": "mii_hcache.config",
    "attach": "mii_hcache.engine.attached",
    "pipeline": "mii_hcache.engine.pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
