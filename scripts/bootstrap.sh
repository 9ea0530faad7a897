#!/usr/bin/env bash
# Makes .venv and installs into it what constraints.txt pins. Run by serve.sh, test.sh and check.sh; also by hand:
#
#   scripts/bootstrap.sh [serve|test]     `test` adds what the test suite needs
#
# No root, no apt, no compiler. When everything is in place it only compares a stamp and returns. Settings:
#   PYTHON=/path/to/python3   the interpreter to build on (default: the first that is 3.10 or newer)
#   MII_HCACHE_VENV=/path     where the virtual environment goes (default: .venv in the checkout)
# pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS, pip.conf, ...) are honoured.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${MII_HCACHE_VENV:-$root/.venv}"
case "$venv" in /*) ;; *) venv="$PWD/$venv" ;; esac
venv_python="$venv/bin/python"
stamp="$venv/.mii_hcache_stamp"     # written last: present means complete
ours="$venv/.mii_hcache_venv"       # written first: this folder may be wiped
log="$venv/install.log"
constraints="$root/constraints.txt"
pytorch_cpu_index="https://download.pytorch.org/whl/cpu"
profile="${1:-serve}"
num_steps=5
step_idx=0
advice=""   # set by a step that knows better than its log what to do

say() { printf 'mii_hcache: %s\n' "$*" >&2; }
die() { say "$@"; exit 1; }

has_nvidia_driver() {
    compgen -G '/dev/nvidia[0-9]*' >/dev/null && return 0
    [ -e /usr/lib/wsl/lib/libcuda.so.1 ] && return 0
    command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q '^GPU '
}
if has_nvidia_driver; then device=cuda; else device=cpu; fi

# ---- the stamp: what was installed, and from which inputs -----------------------------------------------------------

inputs_hash() {
    # the place is part of it: a moved checkout has to be installed anew
    {
        printf '%s\n' "$root" "$venv" "$device"
        cat "$constraints" "$root/pyproject.toml" "$root/setup.py" "$root/scripts/bootstrap.sh" "$root"/csrc/*.cpp "$root"/csrc/*/*.?pp "$root"/csrc/*/*.cu*
    } | sha256sum | cut -d ' ' -f 1
}
python_minor() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null; }
python_path() { "$1" -c 'import sys; print(sys.executable)' 2>/dev/null; }
stamp_field() { sed -n "s/^$1=//p" "$stamp" 2>/dev/null || true; }
has_same_python() {
    [ "$(stamp_field python)" = "$(python_minor "$venv_python")" ] || return 1
    [ -z "${PYTHON:-}" ] || [ "$(stamp_field base)" = "$(python_path "$PYTHON")" ]
}
is_complete() {
    [ -f "$stamp" ] && [ "$(stamp_field inputs)" = "$(inputs_hash)" ] || return 1
    case "$(stamp_field profile)" in test) ;; "$profile") ;; *) return 1 ;; esac
    has_same_python
}

# ---- steps: one line each, the noise goes to the log ----------------------------------------------------------------

step() {  # step "what it does" command...
    local what="$1" start_s=$SECONDS
    shift
    step_idx=$((step_idx + 1))
    printf '[%d/%d] %s ... ' "$step_idx" "$num_steps" "$what" >&2
    printf '\n==== %s\n' "$what" >>"$log"
    if ! "$@" >>"$log" 2>&1; then
        printf 'failed after %d s\n' $((SECONDS - start_s)) >&2
        if [ -n "$advice" ]; then die "$advice"; fi
        # an index address may hold a password: leave addresses out
        sed -n '/^====/h; /^====/!H; ${x; s/^[^\n]*\n*//; p}' "$log" | tail -n 15 | sed -E 's#[a-z]+://[^ ]*#<address>#g; s/^/    /' >&2
        die "stopped; the whole story is in $log. Running the same command again starts over."
    fi
    printf '%d s\n' $((SECONDS - start_s)) >&2
}
pip() {
    # PIP_USER: a `user = true` in pip.conf cannot work inside a virtual environment
    PIP_USER=0 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 "$venv_python" -m pip "$@"
}

# ---- Python and the empty environment -------------------------------------------------------------------------------

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; }
has_cuda_torch() {
    "$1" - >/dev/null 2>&1 <<'PY'
import importlib.metadata, re, torch
major, minor, rest = re.match(r"(\d+)\.(\d+)([^+]*)", importlib.metadata.version("torch")).groups()
is_preview = re.search("[a-z]", rest) is not None   # 2.11.0a0 comes before 2.11
assert (int(major), int(minor)) >= (2, 11 + is_preview) and torch.version.cuda
PY
}
find_python() {
    # sets `base_python`; with a driver, one that brings a CUDA torch comes first
    local name found=""
    if [ -n "${PYTHON:-}" ]; then
        is_new_enough "$PYTHON" || die "PYTHON=$PYTHON does not run, or is older than Python 3.10."
        found="$PYTHON"
        [ "$device" = cuda ] && has_cuda_torch "$PYTHON" && system_torch=yes
    else
        for name in python3 python3.13 python3.12 python3.11 python3.10 python; do
            # by running it: a name can be a shim that leads nowhere
            is_new_enough "$name" || continue
            [ -n "$found" ] || found="$name"
            if [ "$device" = cpu ]; then break; fi
            if has_cuda_torch "$name"; then found="$name" system_torch=yes; break; fi
        done
    fi
    [ -n "$found" ] || die "needs Python 3.10 or newer, and found none. Install one, or point to it: PYTHON=/path/to/python3"
    base_python="$(python_path "$found")"
}
get_pip() {
    # pip's own installer, for a Python that came with neither ensurepip nor pip
    "$venv_python" - "$venv/get-pip.py" <<'PY' && "$venv_python" "$venv/get-pip.py"
import shutil, sys, urllib.request
try:
    with urllib.request.urlopen("https://bootstrap.pypa.io/get-pip.py", timeout=10) as answer, open(sys.argv[1], "wb") as file:
        shutil.copyfileobj(answer, file)
except OSError as error:
    sys.exit(f"pip's installer could not be fetched: {error}")
PY
}
make_venv() {
    local -a access=()
    [ "$system_torch" = yes ] && access=(--system-site-packages)
    # `python -m venv` needs ensurepip, which Debian keeps in a package of its own
    "$base_python" -m venv "${access[@]}" "$venv" && return 0
    echo "no ensurepip: trying without it"
    rm -rf "$venv/bin" "$venv/lib" "$venv/lib64" "$venv/include" "$venv/pyvenv.cfg"
    if "$base_python" -c 'import virtualenv'; then
        "$base_python" -m virtualenv "${access[@]}" "$venv" && return 0
    fi
    "$base_python" -m venv --without-pip "${access[@]}" "$venv" || return 1
    if "$base_python" -m pip --version; then
        PIP_USER=0 "$base_python" -m pip install --ignore-installed --target \
            "$("$venv_python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" pip && return 0
    fi
    get_pip && return 0
    advice="$base_python has neither ensurepip, pip nor virtualenv, and pip's own installer did not answer.
On Debian or Ubuntu an administrator runs:  apt install python3-venv
Without one: PYTHON=/path/to/another/python3 (conda, pyenv and uv bring some without root)."
    return 1
}
see_system_torch() {
    # base_python may itself be a virtual environment, which --system-site-packages does not look into
    has_cuda_torch "$venv_python" && return 0
    "$base_python" -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))' >"$venv/torch_home"
    mv "$venv/torch_home" "$("$venv_python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz_system_torch.pth"
    has_cuda_torch "$venv_python"
}
prepare_python() {
    make_venv || return 1
    pip install -q -c "$constraints" pip setuptools wheel || return 1
    cp "$constraints" "$venv/constraints.txt"
    if [ "$system_torch" = yes ]; then
        see_system_torch || return 1
        # the torch that is here, and the setuptools that it wants, instead of ours
        sed -i '/^torch==/d; /^setuptools==/d' "$venv/constraints.txt"
        "$venv_python" -c 'import importlib.metadata as m; print("torch==" + m.version("torch"))' >>"$venv/constraints.txt"
    fi
}

# ---- torch ----------------------------------------------------------------------------------------------------------

triton_version=3.7.0
torch_version="$(sed -n 's/^torch==\([0-9.]*\).*/\1/p' "$constraints")"
find_cpu_torch() {
    # sets `torch_args`; one quick look at what pip is set up for, then one at PyTorch's own CPU index
    local quick=(install -q --dry-run --no-deps --timeout 5 --retries 0)
    torch_args=("torch==$torch_version+cpu")
    PIP_DEFAULT_TIMEOUT=5 timeout 60 env PIP_USER=0 "$venv_python" -m pip "${quick[@]}" "${torch_args[@]}" && return 0
    torch_args=(--index-url "$pytorch_cpu_index" "torch==$torch_version+cpu")
    PIP_DEFAULT_TIMEOUT=5 timeout 30 env PIP_USER=0 "$venv_python" -m pip "${quick[@]}" "${torch_args[@]}"
}
has_pinned_torch() {
    "$venv_python" - "$torch_version" 2>/dev/null <<'PY'
import importlib.metadata, sys
sys.exit(importlib.metadata.version("torch").split("+")[0] != sys.argv[1])
PY
}
install_torch() {
    if [ "$system_torch" = yes ]; then
        step "using the CUDA torch that is here" true
        return
    fi
    if has_pinned_torch; then
        step "keeping torch $torch_version" true
        return
    fi
    printf '\n==== looking for a CPU torch\n' >>"$log"
    if [ "$device" = cpu ] && find_cpu_torch >>"$log" 2>&1; then
        step "installing torch $torch_version for CPU (about 200 MB)" pip install -q --no-deps "${torch_args[@]}"
        return
    fi
    if [ "$device" = cpu ]; then
        say "no CPU-only build of torch $torch_version answered; the default build comes with CUDA libraries."
        say "To avoid it: interrupt, and point PIP_FIND_LINKS to a folder with the file torch-$torch_version+cpu-*.whl"
    fi
    step "installing torch $torch_version with CUDA (downloads about 3 GB, takes about 5 GB of disk)" \
        pip install -q -c "$constraints" "torch==$torch_version"
}
pin_triton() {
    # for the tests, which run our GPU kernels in Triton's interpreter: 285 MB. A CUDA torch brings the one that it wants
    [ "$profile" = test ] || return 0
    case "$("$venv_python" -c 'import importlib.metadata as m; print(m.version("torch"))')" in
        *+cpu) echo "triton==$triton_version" >>"$venv/constraints.txt" ;;
    esac
}

# ---- the whole ------------------------------------------------------------------------------------------------------

check_imports() {
    "$venv_python" -c 'import mii_hcache, mii, deepspeed, torch, transformers'
}
install() {
    local extras="" start_s=$SECONDS keep=no base="" inputs
    system_torch=no
    inputs="$(inputs_hash)"
    is_complete && return 0   # another run finished while this one waited for the lock
    if [ -f "$stamp" ]; then
        [ "$(stamp_field profile)" = test ] && profile=test
        # another device, place or interpreter: from nothing; other versions: on top of what is there
        [ "$(stamp_field device) $(stamp_field venv)" = "$device $venv" ] && has_same_python && keep=yes
        base="$(stamp_field base)" system_torch="$(stamp_field system_torch)"
        rm -f "$stamp"
    elif [ -d "$venv" ] && [ ! -f "$ours" ] && [ -n "$(ls -A "$venv")" ]; then
        die "$venv was not made by this script. Move it away, or set MII_HCACHE_VENV to another folder."
    fi
    if [ "$keep" = yes ]; then
        say "something changed: bringing $venv up to date"
        base_python="$base"
    else
        say "first use: setting up $venv"
        system_torch=no
        find_python
        rm -rf "$venv"
    fi
    mkdir -p "$venv"
    : >"$ours"
    : >"$log"
    if [ "$profile" = test ]; then extras="[test]"; fi

    step "preparing $("$base_python" -V) from $base_python" prepare_python
    install_torch
    pin_triton
    step "installing DeepSpeed, transformers and the rest (a minute or two)" \
        pip install -q -c "$venv/constraints.txt" --build-constraint "$constraints" -e "$root$extras"
    step "installing DeepSpeed-MII without its CUDA kernels" \
        pip install -q -c "$constraints" --no-deps deepspeed-mii
    step "checking that it imports" check_imports
    {
        printf 'inputs=%s\n' "$inputs"
        printf 'profile=%s\ndevice=%s\nvenv=%s\n' "$profile" "$device" "$venv"
        printf 'python=%s\nbase=%s\n' "$(python_minor "$venv_python")" "$base_python"
        printf 'system_torch=%s\n' "$system_torch"
    } >"$stamp.new"
    mv "$stamp.new" "$stamp"
    say "ready after $((SECONDS - start_s)) s: $("$venv_python" -c '
from importlib.metadata import version
print(", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "deepspeed-mii", "transformers")))')"
}
with_lock() {
    # two commands started at once: the second waits, then finds everything in place
    local lock="$venv.lock" owner waited=""
    mkdir -p "$(dirname "$venv")"
    if command -v flock >/dev/null 2>&1; then
        (
            flock -n 9 || { say "waiting for another set-up of $venv"; flock 9; }
            "$@"
        ) 9>"$lock"
    else
        until mkdir "$lock.d" 2>/dev/null; do
            [ -n "$waited" ] || say "waiting for another set-up of $venv (none is running? remove $lock.d)"
            waited=yes
            owner="$(cat "$lock.d/pid" 2>/dev/null || true)"
            if [ -n "$owner" ] && ! kill -0 "$owner" 2>/dev/null; then rm -rf "$lock.d"; continue; fi
            sleep 1
        done
        echo $$ >"$lock.d/pid"
        trap 'rm -rf "$lock.d"' EXIT
        "$@"
        rm -rf "$lock.d"
        trap - EXIT
    fi
}

case "$profile" in serve | test) ;; *) die "usage: $0 [serve|test]" ;; esac
is_complete || with_lock install
