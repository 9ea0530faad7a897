"""`python -m mii_hcache.storage.pyspdk`: look at raw NVMe namespaces, make one ours, measure it.

Experimental: it has run over NVMe/TCP and on a fake, and never on NVMe hardware.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from mii_hcache.errors import HCacheError
from mii_hcache.storage.format import BLOCK_BYTES
from mii_hcache.storage.nvme import HOW_TO_BUILD, NvmeAddress, NvmeController, NvmeFile
from mii_hcache.storage.nvme_bench import Measured, measure
from mii_hcache.storage.regions import format_namespace
from mii_hcache.storage.state_dir import StateDir, new_store_uuid
from mii_hcache.storage.superblock import describe_block

_DESCRIPTION = """\
Keeps saved state on a raw NVMe namespace, through SPDK: no kernel, no file system, a thread that polls. The catalog
stays in a state directory on an ordinary file system; the namespace holds the segments. EXPERIMENTAL: it has run over
NVMe/TCP and on a fake, and never on NVMe hardware.

A namespace is named as SPDK names it, with words of ours behind, if need be:

  trtype:PCIe traddr:0000:81:00.0
  trtype:TCP adrfam:IPv4 traddr:10.0.0.7 trsvcid:4420 subnqn:nqn.2016-06.io.spdk:state

  ns:2             its number on the controller (1)
  hugepages:off    begin without huge pages (on, but off for TCP)
  memory_mib:512   memory that DPDK takes at the start (512 without huge pages, else DPDK's own choice)

A PCIe controller has to be taken from the kernel first: SPDK's scripts/setup.sh does that. The file systems on it are
out of reach from then on.
"""
_EPILOG = f"""\
the way to a server:
  python -m mii_hcache.storage.pyspdk probe
  python -m mii_hcache.storage.pyspdk probe --trid "trtype:PCIe traddr:0000:81:00.0"
  python -m mii_hcache.storage.pyspdk format --trid "trtype:PCIe traddr:0000:81:00.0" --state-dir /var/lib/hcache
  python -m mii_hcache.serve --state-dir /var/lib/hcache
      the state directory remembers where its segments are

Where this package was built without SPDK: {HOW_TO_BUILD}.
"""
_PCI_DEVICES = Path("/sys/bus/pci/devices")
_NVME_CLASS = "0x010802"


def main(arguments: Sequence[str] | None = None) -> int:
    """0; 2 with a message when something cannot be done."""
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], tuple[dict[str, Any], list[str]]] = options.run
    try:
        facts, lines = run(options)
    except (HCacheError, OSError) as error:
        print(f"pyspdk: {error}", file=sys.stderr)
        return 2
    print(json.dumps(facts, indent=2) if options.json else "\n".join(lines))
    return 0


def _probe(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    if options.trid is None:
        return _list_pci()
    address = NvmeAddress.parse(options.trid)
    with closing(NvmeController(address)) as controller:
        about = dict(controller.about)
    lines = [f"{about['model']}, serial {about['serial']}, firmware {about['firmware']}"]
    namespaces = []
    for namespace_id in about.pop("namespaces"):
        own = NvmeAddress.parse(f"{_without_ns(options.trid)} ns:{namespace_id}")
        try:
            with closing(_Opened(own)) as opened:
                holds = describe_block(opened.first_block())
                namespaces.append({"namespace": namespace_id, **opened.file.shape, "holds": holds})
                shape = opened.file.shape
                lines.append(
                    f"  ns:{namespace_id}  {shape['num_bytes']} bytes in sectors of {shape['sector_bytes']}, up to "
                    f"{shape['max_transfer_bytes']} a command; it seems to hold {holds or 'nothing'}"
                )
        except (HCacheError, OSError) as error:
            namespaces.append({"namespace": namespace_id, "error": str(error)})
            lines.append(f"  ns:{namespace_id}  cannot be used: {error}")
    return {"controller": about, "namespaces": namespaces}, lines


def _list_pci() -> tuple[dict[str, Any], list[str]]:
    """NVMe controllers on this machine's bus, as the kernel knows them: needs no SPDK."""
    found = []
    for path in sorted(_PCI_DEVICES.glob("*")):
        try:
            if (path / "class").read_text().strip() != _NVME_CLASS:
                continue
        except OSError:
            continue
        driver = (path / "driver").resolve().name if (path / "driver").exists() else None
        found.append({"trid": f"trtype:PCIe traddr:{path.name}", "driver": driver})
    if not found:
        return {"controllers": []}, ["no NVMe controller on this machine's PCI bus"]
    lines = [
        f"{one['trid']}  "
        + {"nvme": "in use by the kernel: SPDK's scripts/setup.sh would take it away"}.get(
            str(one["driver"]), f"driver {one['driver']}: --trid looks at it" if one["driver"] else "no driver"
        )
        for one in found
    ]
    return {"controllers": found}, lines


def _format(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    address = NvmeAddress.parse(options.trid)
    with closing(StateDir(options.state_dir)) as state_dir, closing(_Opened(address)) as opened:
        before = state_dir.read_namespace()
        if before not in (None, options.trid) and not options.force:
            raise HCacheError(f"{state_dir.path} keeps its segments on {before} already; --force leaves that behind")
        if any(state_dir.segments.glob("*.seg")) and not options.force:
            raise HCacheError(
                f"{state_dir.path} has segment files: choose a new directory (--force leaves them behind)"
            )
        holds = describe_block(opened.first_block())
        store_uuid = state_dir.read_store_uuid() or new_store_uuid()
        is_own = holds is not None and store_uuid.hex() in holds
        if holds is not None and not is_own and not options.force:
            raise HCacheError(f"{address} seems to hold {holds}; --force erases it")
        if is_own and not options.force:
            raise HCacheError(
                f"{address} is formatted for {state_dir.path} already; --force forgets what is saved there"
            )
        superblock = format_namespace(opened.file, store_uuid, options.region_mib << 20)
        state_dir.write_store_uuid(store_uuid)
        state_dir.write_namespace(options.trid)
    facts = {
        "store": store_uuid.hex(),
        "state_dir": str(state_dir.path),
        "regions": superblock.num_regions,
        "region_bytes": superblock.region_bytes,
        "held": holds,
    }
    lines = [
        f"{address}: {superblock.num_regions} regions of {options.region_mib} MiB, for the state directory "
        f"{state_dir.path}",
        f"next: python -m mii_hcache.serve --state-dir {state_dir.path} "
        f"--state-capacity {superblock.num_regions * options.region_mib}MiB",
    ]
    return facts, lines


def _bench(options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    with closing(_Opened(NvmeAddress.parse(options.trid))) as opened:
        holds = describe_block(opened.first_block())
        if options.write and holds is not None and not options.force:
            raise HCacheError(f"writing would destroy what it seems to hold: {holds}; --force writes all the same")
        runs: dict[str, Measured] = {}
        for name in ["write", "read"] if options.write else ["read"]:
            runs[name] = measure(opened.file, name == "write", options.size_kib << 10, options.depth, options.seconds)
    facts = {"size_bytes": options.size_kib << 10, "depth": options.depth, **{k: r.facts() for k, r in runs.items()}}
    return facts, [f"{name:5}  {run}" for name, run in runs.items()]


class _Opened:
    """A namespace with its thread, until closed."""

    def __init__(self, address: NvmeAddress) -> None:
        self.file = NvmeFile(address)

    def first_block(self) -> memoryview:
        [block] = self.file.read_blocks([(0, BLOCK_BYTES)])
        return block

    def close(self) -> None:
        self.file.close()


def _without_ns(trid: str) -> str:
    return " ".join(word for word in trid.split() if not word.startswith("ns:"))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m mii_hcache.storage.pyspdk", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=style
    )
    commands = parser.add_subparsers(required=True, metavar="probe | format | bench")

    def command(name: str, run: object, text: str, *, needs_trid: bool = True) -> argparse.ArgumentParser:
        own = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        own.add_argument("--trid", required=needs_trid, metavar="ID", help="which namespace (see the general --help)")
        own.add_argument("--json", action="store_true", help="print JSON")
        own.set_defaults(run=run)
        return own

    command(
        "probe",
        _probe,
        "what a controller's namespaces are and seem to hold; without --trid, which controllers are on the PCI bus",
        needs_trid=False,
    )
    own = command("format", _format, "make a namespace the place of a state directory's segments; erases it")
    own.add_argument("--state-dir", required=True, metavar="DIR", help="keeps the catalog, on an ordinary file system")
    own.add_argument(
        "--region-mib", type=_count, default=64, metavar="N", help="size of a region: a segment has one (default: 64)"
    )
    own.add_argument("--force", action="store_true", help="erase whatever the namespace holds")
    own = command("bench", _bench, "how fast a namespace is read, and, with --write, written")
    own.add_argument("--size-kib", type=_count, default=512, metavar="N", help="size of a request (default: 512)")
    own.add_argument("--depth", type=_count, default=32, metavar="N", help="requests in flight (default: 32)")
    own.add_argument("--seconds", type=_count, default=3, metavar="N", help="how long each (default: 3)")
    own.add_argument("--write", action="store_true", help="write as well: destroys what the namespace holds")
    own.add_argument("--force", action="store_true", help="write although it holds something")
    return parser


if __name__ == "__main__":
    sys.exit(main())
