"""Is the software there that a server stands on, in versions that it was tried with?"""

from __future__ import annotations

import platform
import sys
import tempfile
from functools import partial
from pathlib import Path

from mii_hcache.core.geometry import ChunkKind
from mii_hcache.core.methods import default_method
from mii_hcache.errors import ConfigError, HCacheError
from mii_hcache.runtime.machine import package_version
from mii_hcache.tools.findings import Check, Finding, ok, problem

_SERVER_PACKAGES = ("fastapi", "uvicorn", "pydantic", "prometheus_client", "safetensors", "tokenizers", "crc32c")
_INSTALL = "run scripts/bootstrap.sh, or pip install -c constraints.txt -e ."


def software_checks(model: str | None) -> list[tuple[str, Check]]:
    """In the order in which they should be told."""
    return [
        ("python", _python),
        ("torch", _torch),
        ("deepspeed", partial(_tried, "deepspeed")),
        ("deepspeed-mii", partial(_tried, "deepspeed-mii")),
        ("transformers", partial(_installed, "transformers")),
        ("server", _server_packages),
        ("host's names", _host),
        ("kernels", _kernels),
        ("families", _families),
        ("method", partial(_method, model)),
    ]


def _python() -> Finding:
    return ok("python", f"{platform.python_version()}, {sys.executable}")


def _installed(name: str) -> Finding:
    number = package_version(name)
    return ok(name, number) if number else problem(name, "not installed", _INSTALL, prevents_serving=True)


def _torch() -> Finding:
    if package_version("torch") is None:
        return problem("torch", "not installed", _INSTALL, prevents_serving=True)
    import torch

    return ok(
        "torch", f"{torch.__version__}, built {f'for CUDA {torch.version.cuda}' if torch.version.cuda else 'for CPUs'}"
    )


def _tried(name: str) -> Finding:
    number = package_version(name)
    if number is None:
        return problem(name, "not installed", _INSTALL, prevents_serving=True)
    from mii_hcache.engine.compat import TRIED_VERSIONS

    tried = TRIED_VERSIONS[name]
    if number != tried:
        return problem(name, f"{number}; only {tried} was tried", f"pip install {name}=={tried}")
    return ok(name, f"{number}, the version that was tried")


def _server_packages() -> Finding:
    missing = [name for name in _SERVER_PACKAGES if package_version(name) is None]
    if missing:
        return problem("server", f"not installed: {', '.join(missing)}", _INSTALL, prevents_serving=True)
    return ok("server", ", ".join(f"{name} {package_version(name)}" for name in _SERVER_PACKAGES[:2]))


def _host() -> Finding:
    """The canary of `engine.compat`: everything upstream that is patched or leaned on must be where it was."""
    from mii_hcache.engine import compat

    missing = compat.missing_names()
    if missing:
        where = f"{len(missing)} of {len(compat.NEEDED_NAMES)} are missing, first {missing[0]}"
        return problem("host's names", where, f"install the tried versions: {_INSTALL}", prevents_serving=True)
    try:
        compat.install()
    except HCacheError as error:
        return problem("host's names", str(error), _INSTALL, prevents_serving=True)
    return ok("host's names", f"all {len(compat.NEEDED_NAMES)} names of DeepSpeed and MII that are leaned on are there")


def _kernels() -> Finding:
    """What `--kernels auto` would take here, and why."""
    import torch

    from mii_hcache.engine import modules

    triton = package_version("triton")
    if not torch.cuda.is_available():
        return ok("kernels", "plain torch, as there is no GPU; Triton is for those, and nothing else is needed here")
    if modules.resolve("auto", "cuda") == "torch":
        return problem(
            "kernels", "Triton is not installed: attention runs in plain torch, slowly", "pip install triton"
        )
    return ok("kernels", f"Triton {triton}, our own (--kernels portable): never run on a GPU by their authors")


def _families() -> Finding:
    from mii_hcache.engine.families import FAMILIES

    return ok("families", "; ".join(family.summary for family in FAMILIES.values()))


def _method(model: str | None) -> Finding:
    """What is saved by default, and what each way weighs."""
    from mii_hcache.engine.config_geometry import dtype_of_config, geometry_of_config, read_config

    if model is None:
        from mii_hcache.engine.demo_model import ensure_demo_model

        with tempfile.TemporaryDirectory(prefix="hcache-doctor-") as folder:
            config = read_config(str(ensure_demo_model(Path(folder))))
        name = "the demo model"
    else:
        try:
            config = read_config(model)
        except ConfigError as error:
            return problem("method", str(error), "check --model", prevents_serving=True)
        name = model
    from mii_hcache.engine.families import FAMILIES, refusal_of

    reason = refusal_of(config)
    if reason is not None:
        return problem("method", reason, f"choose one of {', '.join(FAMILIES)}", prevents_serving=True)
    try:
        geometry = geometry_of_config(config, dtype_of_config(config))
    except ConfigError as error:
        return problem("method", str(error), "check --model", prevents_serving=True)
    hidden, kv = (geometry.bytes_per_token(kind) / 1024 for kind in (ChunkKind.HIDDEN, ChunkKind.KV))
    method = default_method(geometry)
    return ok(
        "method",
        f"auto: planned from the profile (without a plan {method.name}, the smaller one, for {name}); "
        f"a token takes {hidden:.1f} KiB as hidden states, {kv:.1f} KiB as K and V",
    )
