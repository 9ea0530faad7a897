"""The benchmark on one GPU: what is restored is right, what the machine can do, and how near to it restores come.

    python -m experiments.gpu_restore.run --out build/gpu_restore --deadline-s 540
    python -m experiments.gpu_restore.run --out /tmp/try --device cpu --scale tiny

Cells run in the order of what they answer; each one's rows are in `rows.jsonl` when it is over, and nothing starts that
would outlast the deadline. The same command again goes on where it was; when the process died under a cell (the file
`begun` beside the rows names it) that is the thing to do, and that cell then comes last. `report.py` makes the tables.
Random weights in the shapes of real models; no downloads. **Not run on a GPU yet.** The small scale on a CPU shows that
everything runs, and its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from experiments.gpu_restore.ledger import FIGURE, Cell, Deadline, DeviceLost, GateFailed, Ledger, Number
from experiments.gpu_restore.scales import METHODS, SCALES, Model, Scale, label

ROWS = "rows.jsonl"
BUILD_S = 15.0
"""Of loading a model, expected."""
QUERIES = (
    "name",
    "memory.total",
    "pcie.link.gen.current",
    "pcie.link.width.current",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.limit",
    "temperature.gpu",
)
"""What nvidia-smi is asked of the card as it was found."""


class Bench:
    """The cells, and the one engine that is loaded."""

    def __init__(self, scale: Scale, ledger: Ledger) -> None:
        self.scale = scale
        self.ledger = ledger
        self._rig: object | None = None
        self._model: Model | None = None

    def cells(self) -> Iterator[Cell]:
        """All of them, in order; the first one of another model takes as much longer as it takes to load it."""
        before = ""
        for cell in self._in_order():
            is_new = cell.model not in ("", before) and self.scale.name != "tiny"
            yield replace(cell, expected_s=cell.expected_s + BUILD_S) if is_new else cell
            before = cell.model

    def _in_order(self) -> Iterator[Cell]:
        from experiments.gpu_restore import ceilings, latency, restores

        scale, first = self.scale, self.scale.models[0]

        def ceiling(part: Callable[..., Iterable[Number]]) -> Cell:
            return self._on(first, f"ceilings/{part.__name__}", 6.0, part)

        def first_token(num_tokens: int) -> Cell:
            expected_s = 20.0 * num_tokens / 16384 + 5.0
            return self._on(
                first, f"ttft/{num_tokens}", expected_s, lambda rig: latency.first_token(rig, METHODS, num_tokens)
            )

        def saving(size: int) -> Cell:
            return self._on(first, f"decode/saving/{size}", 10.0, lambda rig: latency.saving(rig, size))

        def beside(size: int) -> Cell:
            return self._on(first, f"decode/beside/{size}", 15.0, lambda rig: latency.beside(rig, size, restorers(rig)))

        def speed(kernels: str) -> Cell:
            return self._cell(f"speed/{kernels}", "", 35.0, lambda: self._speeds(kernels))

        def emulated(rate: float) -> Cell:
            return self._on(
                first,
                f"emulated/{rate / 1e9:g}",
                25.0 * scale.emulated_tokens / 16384 + 3.0,
                lambda rig: restores.emulated(
                    rig, ("hidden", "kv", "auto", "cake"), scale.emulated_tokens, rate, self._numbers
                ),
            )

        def gate(dtype: str) -> Cell:
            return self._cell(f"gate/{dtype}", "", 30.0, lambda: self._gate(dtype), is_gate=True)

        # What the numbers behind it rest on, and the bounds' peaks.
        yield gate(scale.gate_dtypes[0])
        yield from map(ceiling, (ceilings.copies, ceilings.products, ceilings.attention))
        # What must be shown: restores near their bounds, first tokens, and what saving costs between tokens.
        yield self._sweep(first, METHODS, first.contexts[0])
        yield first_token(scale.ttft_tokens[0])
        yield from map(saving, scale.decode_batches[:2])
        for num_tokens in first.contexts[1:2]:
            yield self._sweep(first, METHODS, num_tokens)
        # Why it is so; the engine beside others.
        yield from map(ceiling, (ceilings.store_reads, ceilings.placing, ceilings.both))
        yield from map(speed, ("portable", "transformers", "stock"))
        # The same at other lengths, other dtypes and in other company.
        for num_tokens in first.contexts[2:4]:
            yield self._sweep(first, METHODS, num_tokens)
        yield from map(beside, scale.decode_batches[1:2])
        yield from map(first_token, scale.ttft_tokens[1:])
        yield from map(saving, scale.decode_batches[2:])
        yield from map(emulated, scale.emulated_bytes_per_s)
        yield from map(gate, scale.gate_dtypes[1:])
        for model in scale.models[1:]:
            yield self._on(model, "ceilings/products", 5.0, ceilings.products)
            for num_tokens in model.contexts[:2]:
                yield self._sweep(model, METHODS, num_tokens)
        yield from map(beside, (*scale.decode_batches[:1], *scale.decode_batches[2:]))
        for num_tokens in first.contexts[4:]:
            yield self._sweep(first, METHODS, num_tokens)
        for model in scale.models[1:]:
            for num_tokens in model.contexts[2:]:
                yield self._sweep(model, METHODS, num_tokens)
        # By a kernel that ends the process's work on the device where it finds a mistake.
        yield ceiling(ceilings.scatter)
        yield speed("cuda")

    def _cell(
        self, key: str, model: str, expected_s: float, measure: Callable[[], Iterable[Number]], is_gate: bool = False
    ) -> Cell:
        if self.scale.name == "tiny":
            expected_s = 0.5
        return Cell(key=key, model=model, expected_s=expected_s, measure=measure, is_gate=is_gate)

    def _on(self, model: Model, key: str, expected_s: float, part: Callable[..., Iterable[Number]]) -> Cell:
        """With the model's engine."""
        name = label(model)
        return self._cell(f"{name}/{key}", name, expected_s, lambda: part(self._rig_of(model)))

    def _sweep(self, model: Model, methods: Sequence[str], num_tokens: int) -> Cell:
        from experiments.gpu_restore import restores

        return self._on(
            model,
            f"restore/{num_tokens}",
            (40.0 if model.shape == "llama2-13b" else 25.0) * num_tokens / 16384 + 4.0,
            lambda rig: restores.sweep(rig, methods, num_tokens, self._numbers),
        )

    def _numbers(self):  # type: ignore[no-untyped-def]
        from experiments.gpu_restore.targets import Numbers

        return Numbers(self.ledger.rows)

    def _rig_of(self, model: Model):  # type: ignore[no-untyped-def]
        from experiments.gpu_restore.rig import Rig

        if self._model is not model:
            self.unload()
            started_s = time.monotonic()
            self._rig, self._model = Rig(model, self.scale), model
            print(f"  {label(model)} loaded in {time.monotonic() - started_s:.1f} s", flush=True)
        return self._rig

    def unload(self) -> None:
        """Free the device for another engine."""
        rig, self._rig, self._model = self._rig, None, None
        if rig is not None:
            rig.close()  # type: ignore[attr-defined]

    def recover(self) -> None:
        """A cell failed: what it left behind, sequences that live and memory that is full, is not the next one's.
        Raises DeviceLost."""
        try:
            self.unload()
        except Exception as error:
            print(f"  the engine could not be closed: {error}", flush=True)
        check_device()

    def _gate(self, dtype: str) -> Iterable[Number]:
        from experiments.gpu_restore import gate

        self.unload()
        return gate.check(self.scale.models[0], self.scale, dtype)

    def _speeds(self, kernels: str) -> Iterable[Number]:
        from experiments.gpu_restore import engines

        self.unload()
        return engines.speeds(self.scale.models[0], self.scale, kernels)


def check_device() -> None:
    """Raises DeviceLost when the device answers no more: every later call of this process would fail."""
    import torch

    gc.collect()
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").sum().item()
    except RuntimeError as error:
        raise DeviceLost(str(error).partition("\n")[0]) from error


def restorers(rig):  # type: ignore[no-untyped-def]
    """Ways to share the device with decoding, by name. Streams differ on a GPU only."""
    return {"low priority": rig.restorer(), "high priority": rig.restorer(is_urgent=True)}


def nvidia_smi(query: str) -> str:
    """One line of answers, "" where there is no such program."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return ""


def stamp(commit: str | None):  # type: ignore[no-untyped-def]
    """What every row says of the machine, the versions and the commit."""
    import torch

    from experiments.common.rows import Row, provenance
    from mii_hcache.runtime.machine import cpu_name, device_name, num_usable_cpus, package_version, software

    versions, found = provenance()
    is_cuda = torch.cuda.is_available()
    device = torch.device("cuda" if is_cuda else "cpu")
    versions |= {name: version for name, version in software().items() if version}
    versions |= {"triton": package_version("triton") or "-", "cuda": torch.version.cuda or "-"}
    if is_cuda:
        versions["driver"] = nvidia_smi("driver_version")
    machine = f"{device_name(device)}; {cpu_name()}, {num_usable_cpus()} cores" if is_cuda else device_name(device)
    return Row(
        figure=FIGURE,
        series="-",
        x="",
        y=0.0,
        unit="-",
        how="measured",
        machine=machine,
        versions=versions,
        commit=commit or found,
    )


def facts() -> Iterator[Number]:
    """The machine as it was found, in words."""
    queries = ",".join(QUERIES)
    yield Number(panel="machine", series=queries, x="", y=None, unit="-", note=nvidia_smi(queries) or "no nvidia-smi")
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    with contextlib.suppress(OSError):
        yield Number(
            panel="machine", series="transparent huge pages", x="", y=None, unit="-", note=huge.read_text().strip()
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Status 0 when all that ran succeeded, also when some was skipped for time; 1 when a cell failed, 2 when a gate
    did, 4 when the device was lost: started again, the others are measured."""
    options = parse(argv)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU is there; --device cpu --scale tiny shows that everything runs")
    deadline = Deadline(total_s=options.deadline_s)
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        ledger = Ledger(options.out / ROWS, stamp(options.commit))
    except ValueError as error:
        raise SystemExit(str(error)) from error
    bench = Bench(SCALES[options.scale], ledger)
    cells = [cell for cell in bench.cells() if not options.only or any(cell.key.find(one) >= 0 for one in options.only)]
    cells.insert(0, Cell(key="machine", model="", expected_s=0.0, measure=facts))
    try:
        num_failed = ledger.run(
            cells,
            deadline,
            lambda words: print(f"[gpu_restore] {words}", flush=True),
            recover=bench.recover,
            ends_hanging=options.device == "cuda",
        )
    except GateFailed as failed:
        timed = "nothing was timed" if ledger.done <= {"machine"} else "no time counts"
        print(f"[gpu_restore] the gate failed, {timed}: {failed}", flush=True)
        return 2
    except DeviceLost as lost:
        print(f"[gpu_restore] the device is lost to this process: {lost}", flush=True)
        return 4
    bench.unload()
    left = sum(cell.key not in ledger.done for cell in cells) - num_failed
    print(f"[gpu_restore] {len(ledger.done)} cells done, {num_failed} failed, {left} left for another run", flush=True)
    return 1 if num_failed else 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for rows.jsonl; of an earlier run: goes on")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--scale", choices=SCALES, default="h200")
    parser.add_argument("--deadline-s", type=float, default=540.0, help="seconds after which nothing new starts")
    parser.add_argument("--only", action="append", help="cells whose key has this in it; may be given several times")
    parser.add_argument("--commit", help="what rows say where there is no git checkout")
    return parser.parse_args(argv)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # all rows are on disk; tens of gigabytes of pinned memory need no orderly end, which might hang
