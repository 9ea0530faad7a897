#!/usr/bin/env bash
# Everything that needs a GPU, in one command and without the internet: the GPU tests, then the benchmark of restores
# with its correctness gate, then its report. Meant for ten minutes on one card. Tests get a quarter of the time at most,
# several at once where pytest-xdist is there. A benchmark that died or hung is started again, as long as there is time:
# it goes on behind the cell that it died under.
#
#   scripts/gpu_check.sh [--out DIR] [--scratch DIR] [--deadline-s N] [--quick]
#   scripts/gpu_check.sh --dry-run --out DIR          the same on a CPU, tiny: shows that everything runs, no results
#   scripts/gpu_check.sh --make-wheelhouse DIR [--python 3.12]
#
# --out DIR         where results go, eight files (default: build/gpu_check); rows of an earlier run there are gone on with
# --scratch DIR     where all else goes: unpacked wheels, compiled kernels (default: OUT/scratch)
# --deadline-s N    seconds in all, after which nothing new starts (default: 540)
# --quick           tests, gate and ceilings only
# --wheelhouse DIR  packages for a machine without network (default: wheelhouse/ in the checkout, where there is one)
# --commit NAME     what rows say where there is no git checkout
#
# The interpreter is $MII_HCACHE_PYTHON; else, with a wheelhouse, the first python3 that brings a CUDA torch; else what
# scripts/bootstrap.sh sets up, which needs network the first time. Wheels are added for this run alone: nothing is
# installed. --make-wheelhouse downloads what constraints.txt pins for such a machine, without torch, Triton, NVIDIA's
# libraries and numpy, which a machine with a CUDA torch has: take DIR along.
#
# Exit status: 0 all passed, 1 a test or a part of the benchmark failed, 2 what was restored is wrong, 3 not set up.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
out="$root/build/gpu_check"
wheelhouse="$root/wheelhouse"
deadline_s=540
most_wheel_mb=60
quick="" dry="" make="" target_python="" commit="" scratch=""

say() { printf 'gpu_check: %s\n' "$*"; }
die() { printf 'gpu_check: %s\n' "$*" >&2; exit 3; }
absolute() { case "$1" in /*) printf '%s' "$1" ;; *) printf '%s/%s' "$PWD" "$1" ;; esac; }

while [ $# -gt 0 ]; do
    case "$1" in
        --out) out="$(absolute "${2:?--out needs a folder}")"; shift ;;
        --scratch) scratch="$(absolute "${2:?--scratch needs a folder}")"; shift ;;
        --deadline-s) deadline_s="${2:?--deadline-s needs seconds}"; shift ;;
        --wheelhouse) wheelhouse="$(absolute "${2:?--wheelhouse needs a folder}")"; shift ;;
        --make-wheelhouse) make="$(absolute "${2:?--make-wheelhouse needs a folder}")"; shift ;;
        --python) target_python="${2:?--python needs a version}"; shift ;;
        --commit) commit="${2:?--commit needs a name}"; shift ;;
        --quick) quick=yes ;;
        --dry-run) dry=yes ;;
        -h | --help) sed -n '2,/^set -euo/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//'; exit 0 ;;
        *) die "unknown option $1; --help lists them" ;;
    esac
    shift
done

# ---- the wheelhouse ---------------------------------------------------------------------------------------------------

# What neither the engine nor its tests import: tools, figures, clients. And what comes with a CUDA torch.
left_out="torch numpy sympy mpmath networkx wheel pip
matplotlib contourpy cycler fonttools kiwisolver pillow pyparsing
mypy mypy-extensions librt ast-serialize pathspec ruff
schemathesis hypothesis-graphql graphql-core jsonschema-rs harfile pyrate-limiter opentelemetry-api
openai jiter hf-xet"

make_wheelhouse() {
    local python="${MII_HCACHE_PYTHON:-python3}" size_mb
    local -a platforms=() names=()
    target_python="${target_python:-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')}"
    for glibc in 28 27 26 24 17 12 5; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
    platforms+=(--platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64 --platform any)
    mapfile -t names < <("$python" - "$root/constraints.txt" "$target_python" $left_out <<'PY'
import sys
from pip._vendor.packaging.requirements import Requirement
path, version, *left_out = sys.argv[1:]
for line in open(path):
    if line.strip() and not line.startswith("#"):
        pinned = Requirement(line.strip())
        holds = pinned.marker is None or pinned.marker.evaluate({"python_version": version, "python_full_version": version + ".0"})
        if holds and pinned.name not in left_out:
            print(f"{pinned.name}{pinned.specifier}")
PY
    )
    mkdir -p "$make"
    rm -f "$make"/*.whl
    export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
    say "downloading ${#names[@]} packages for Python $target_python"
    for name in "${names[@]}"; do
        case "$name" in
            # only its sources are published; the wheel is plain Python
            deepspeed==*) "$python" -m pip wheel -q --no-deps -w "$make" "$name" || die "no wheel of $name could be built" ;;
        esac
    done
    printf '%s\n' "${names[@]}" | grep -v '^deepspeed==' |
        "$python" -m pip download -q --no-deps --only-binary=:all: --python-version "$target_python" \
            "${platforms[@]}" -d "$make" -r /dev/stdin || die "some packages could not be downloaded"
    size_mb=$(($(du -sk "$make" | cut -f 1) / 1024 + 1))
    say "$(find "$make" -name '*.whl' | wc -l) wheels, $size_mb MB in $make"
    [ "$size_mb" -le "$most_wheel_mb" ] || die "that is more than $most_wheel_mb MB: add to left_out in this script what is not needed"
}

if [ -n "$make" ]; then
    make_wheelhouse
    exit 0
fi

# ---- an interpreter ---------------------------------------------------------------------------------------------------

started_s=$SECONDS
scratch="${scratch:-$out/scratch}"
mkdir -p "$out" "$scratch"
log="$out/setup.log"
: >"$log"

has_cuda_torch() { "$1" -c 'import torch; assert torch.version.cuda' >>"$log" 2>&1; }

unpack_wheels() {  # into $scratch/lib, which the interpreter looks into before its own packages
    "$python" - "$wheelhouse" "$scratch/lib" >>"$log" 2>&1 <<'PY'
import pathlib, shutil, sys, zipfile
source, target = map(pathlib.Path, sys.argv[1:])
names = "\n".join(sorted(path.name for path in source.glob("*.whl")))
stamp = target / "wheels.txt"
if stamp.is_file() and stamp.read_text() == names:
    sys.exit()
shutil.rmtree(target, ignore_errors=True)
target.mkdir(parents=True)
for path in source.glob("*.whl"):
    with zipfile.ZipFile(path) as wheel:
        for name in wheel.namelist():
            parts = pathlib.PurePosixPath(name).parts
            if parts[0].endswith(".data"):  # scripts and headers are not needed
                if len(parts) < 3 or parts[1] not in ("purelib", "platlib"):
                    continue
                parts = parts[2:]
            if not name.endswith("/"):
                place = target.joinpath(*parts)
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(wheel.read(name))
stamp.write_text(names)
PY
}

python="${MII_HCACHE_PYTHON:-}"
path="$root"
if [ -n "$(find "$wheelhouse" -maxdepth 1 -name '*.whl' 2>/dev/null | head -n 1)" ]; then
    if [ -z "$python" ]; then
        for name in python3 python3.13 python3.12 python3.11 python3.10 python; do
            if command -v "$name" >/dev/null 2>&1 && has_cuda_torch "$name"; then python="$name"; break; fi
        done
        [ -n "$python" ] || die "no python3 here brings a CUDA torch; point to one: MII_HCACHE_PYTHON=/path/to/python3"
    fi
    unpack_wheels || die "the wheels in $wheelhouse could not be unpacked: see $log"
    path="$root:$scratch/lib"
elif [ -z "$python" ]; then
    "$root/scripts/bootstrap.sh" test || die "scripts/bootstrap.sh failed; without network give --wheelhouse (--help)"
    venv="$(absolute "${MII_HCACHE_VENV:-$root/.venv}")"
    python="$venv/bin/python"
fi
export PYTHONPATH="$path${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONFAULTHANDLER=1
if [ -z "$commit" ] && commit="$(git -C "$root" rev-parse --short HEAD 2>/dev/null)"; then
    [ -z "$(git -C "$root" status --porcelain 2>/dev/null)" ] || commit="$commit+"
fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$scratch/triton}"
cd "$root"
"$python" -c 'import numpy, crc32c, deepspeed, mii, pytest, pytest_timeout, torch, transformers' >>"$log" 2>&1 || {
    tail -n 3 "$log" >&2
    die "$python lacks something: see $log. A wheelhouse for it: scripts/gpu_check.sh --make-wheelhouse DIR --python VERSION"
}
# The native engine: where it is not built for this interpreter, and there is a compiler, in a copy of the checkout.
why_not_native() { "$python" -c 'from mii_hcache.storage.native import why_not_built as why; print(why() or "")'; }
if [ -n "$(why_not_native)" ] && command -v g++ >/dev/null 2>&1; then
    build_s=$SECONDS
    say "building the native engine ..."
    mkdir -p "$scratch/checkout"
    cp -r mii_hcache experiments tests csrc scripts .github setup.py pyproject.toml constraints.txt README.md LICENSE "$scratch/checkout/"
    cd "$scratch/checkout"
    export PYTHONPATH="$scratch/checkout:${PYTHONPATH#"$root":}"
    timeout $((deadline_s / 4)) "$python" - >>"$log" 2>&1 <<'PY' || say "the native engine was not built: see $log"
import os, runpy, sys
from pybind11.setup_helpers import ParallelCompile
ParallelCompile(default=len(os.sched_getaffinity(0))).install()
sys.argv = ["setup.py", "build_ext", "--inplace"]
sys.path.insert(0, os.getcwd())
runpy.run_path("setup.py", run_name="__main__")
PY
    say "that took $((SECONDS - build_s)) s"
fi
"$python" - <<'PY' | tee -a "$log"
import importlib.metadata as m, os, platform, torch
from mii_hcache.storage import native
def version(name):
    try:
        return m.version(name)  # of the one that is imported: wheels come before what the interpreter has
    except m.PackageNotFoundError:
        return "-"
names = ("torch", "triton", "deepspeed", "deepspeed-mii", "transformers", "numpy")
print("gpu_check: Python", platform.python_version() + ",", ", ".join(f"{name} {version(name)}" for name in names))
device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
print(f"gpu_check: {device}, CUDA {torch.version.cuda or '-'}; native engine: {native.why_not_built() or 'built'}; "
      f"CUDA kernels: {native.why_no_kernels() or 'built'}; {len(os.sched_getaffinity(0))} CPUs")
PY
if [ -n "$dry" ]; then
    export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1
else
    "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' || die "torch sees no GPU; --dry-run shows that everything runs"
    export TRITON_INTERPRET=0  # whatever the tests think that this machine is
    if command -v nvidia-smi >/dev/null 2>&1; then timeout 20 nvidia-smi >>"$log" 2>&1 || true; fi
fi

# ---- tests, benchmark, report -----------------------------------------------------------------------------------------

status=0
declare -a told=()
left_s() { printf '%d' $((deadline_s - (SECONDS - started_s))); }
note() { told+=("$1"); say "$1"; }

run_tests() {
    local code=0 most_s=$(($(left_s) / 4)) workers
    local -a how=(-o addopts= -q -rs -p no:cacheprovider -p pytest_timeout --timeout 90 --timeout-method thread)
    how+=(--junitxml "$out/tests.xml")
    export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1  # this machine's own may not go with our pytest
    [ "$most_s" -gt 10 ] || { note "tests: skipped, no time is left"; status=1; return; }
    workers=$(($(nproc) / 2))
    [ "$workers" -le 6 ] || workers=6  # each has a CUDA context, and the engines that its tests build
    if [ "$workers" -gt 1 ] && "$python" -c 'import xdist' >>"$log" 2>&1; then
        how+=(-p xdist.plugin -n "$workers" --dist worksteal)
    fi
    # an interrupted pytest still says what it has seen
    timeout -s INT -k 10 "$most_s" "$python" -m pytest "${how[@]}" tests/gpu tests/storage/gpu/test_cufile.py::test_on_a_gpu \
        >"$out/tests.log" 2>&1 || code=$?
    tail -n 15 "$out/tests.log"
    case "$code" in
        0) note "tests: $(tail -n 1 "$out/tests.log" | tr -d '=')" ;;
        124 | 137) note "tests: FAILED, they took more than $most_s s (tests.log)"; status=1 ;;
        *) note "tests: FAILED (tests.log): $(tail -n 1 "$out/tests.log" | tr -d '=')"; status=1 ;;
    esac
}

run_benchmark() {
    local code spare_s=20 left attempt last
    local -a options=(--out "$out" --commit "$commit")
    [ -n "$commit" ] || options=(--out "$out")
    if [ -n "$dry" ]; then options+=(--device cpu --scale tiny); fi
    if [ -n "$quick" ]; then options+=(--only gate --only ceilings); fi
    for attempt in 1 2 3 4; do
        code=0
        left=$(($(left_s) - spare_s))
        [ "$left" -gt 0 ] || left=0
        # what has started may outlast the deadline a little, but not the machine
        timeout -k 5 $((left + 30)) "$python" -m experiments.gpu_restore.run "${options[@]}" --deadline-s "$left" 2>&1 |
            tee -a "$out/benchmark.log" || code=$?
        [ -f "$out/begun" ] || [ "$code" = 4 ] || break
        [ "$(left_s)" -gt $((spare_s + 40)) ] && [ "$attempt" -lt 4 ] || break
        say "the benchmark ended with status $code under $(cat "$out/begun" 2>/dev/null || echo 'a cell'); it goes on with the others"
    done
    last="$(grep '^\[gpu_restore\] ' "$out/benchmark.log" | tail -n 1 | sed 's/^\[gpu_restore\] //' || true)"
    if [ -f "$out/begun" ]; then last="${last:-nothing}; $(cat "$out/begun") was cut off"; fi
    case "$code" in
        0) note "benchmark: $last" ;;
        2) note "benchmark: WRONG: $last"; status=2 ;;
        *) note "benchmark: FAILED with status $code (benchmark.log): $last"; [ "$status" = 2 ] || status=1 ;;
    esac
    if [ "$attempt" -gt 1 ]; then note "benchmark: started $attempt times (benchmark.log says why)"; [ "$status" = 2 ] || status=1; fi
}

run_report() {
    local code=0
    timeout 60 "$python" -m experiments.gpu_restore.report --rows "$out/rows.jsonl" --out "$out" >"$scratch/report.log" 2>&1 || code=$?
    if [ "$code" = 0 ]; then
        sed -n '/^## Targets/,/^## /p' "$out/gpu_restore.md" | sed '$d'
        note "report: $out/gpu_restore.md"
    else
        tail -n 20 "$scratch/report.log" | tee -a "$log"
        note "report: FAILED (setup.log)"
        status=1
    fi
}

: >"$out/benchmark.log"
run_tests
run_benchmark
run_report

say "---- $((SECONDS - started_s)) s; everything is in $out"
for line in "${told[@]}"; do say "$line"; done
if [ -n "$dry" ]; then say "a dry run on a CPU: nothing of this is a result"; fi
exit "$status"
