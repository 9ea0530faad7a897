"""The few exceptions of mii_hcache. A miss is a value (`0`, `None`), never one of these."""


class HCacheError(Exception):
    """Base of every error that mii_hcache raises on purpose."""


class ConfigError(HCacheError, ValueError):
    """A setting is wrong. The message names the field, the value and the fix."""


class UnsupportedModelError(HCacheError):
    """The model cannot be served right; the message says why and what can be served."""


class CorruptChunkError(HCacheError):
    """Stored bytes are not what was written. Caught in one place: the restorer cuts the prefix there."""


class StateDirBusyError(HCacheError):
    """Another server owns the state directory; the message names its process id."""


class RankLostError(HCacheError):
    """A process of a model over several died or hangs: the model is incomplete, and its engine never runs again. The
    message says which and why."""


class RequestError(HCacheError, ValueError):
    """A request can never be served as asked (too long, bad token id). Maps to HTTP 400."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class QueueFullError(HCacheError):
    """Too many requests wait. Maps to HTTP 429."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
