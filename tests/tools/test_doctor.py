"""The doctor's findings: a sound installation, and each thing that can be wrong with it."""

from __future__ import annotations

import json
import os
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mii_hcache.__main__ import main
from mii_hcache.engine import compat, modules
from mii_hcache.engine.config_geometry import read_config
from mii_hcache.errors import ConfigError, HCacheError
from mii_hcache.runtime import pinned
from mii_hcache.runtime.machine import filesystem_of
from mii_hcache.runtime.pinned import PinnedMemory
from mii_hcache.runtime.registrar import Registrar
from mii_hcache.storage import disk_space, open_io
from mii_hcache.storage.open import open_state
from mii_hcache.storage.state_dir import StateDir
from mii_hcache.tools import machine_checks, nvme_checks, software_checks, state_checks
from mii_hcache.tools.findings import Finding, find_out, ok

compat.install()  # its imports write to a stdout that is one test's own

Doctor = Callable[..., tuple[int, dict[str, dict[str, Any]]]]


@pytest.fixture
def doctor(tiny_model, tmp_path, capsys) -> Doctor:
    """Run on a tiny model and a directory that does not exist yet; returns the exit status and the findings by name."""

    def run(*options: str) -> tuple[int, dict[str, dict[str, Any]]]:
        defaults = ["--model", str(tiny_model("llama"))]
        if "--state-dir" not in options:
            defaults += ["--state-dir", str(tmp_path / "state")]
        status = main(["doctor", *defaults, *options, "--json"])
        report = json.loads(capsys.readouterr().out)
        assert report["ok"] == (status == 0)
        return status, {finding["name"]: finding for finding in report["findings"]}

    return run


def one(checks: list[tuple[str, Callable[[], Finding]]], name: str) -> Finding:
    return next(check() for checked, check in checks if checked == name)


def test_a_sound_installation(doctor, tmp_path):
    status, findings = doctor()
    assert status == 0
    assert {name for name, finding in findings.items() if finding["state"] == "problem"} <= {"CPU", "memory", "disk"}
    assert findings["torch"]["reason"].startswith(torch.__version__)
    assert findings["deepspeed"]["reason"] == "0.19.8, the version that was tried"
    assert "names of DeepSpeed and MII" in findings["host's names"]["reason"]
    assert "Mixtral" in findings["families"]["reason"]
    assert findings["kernels"]["state"] == "ok"
    assert findings["method"]["reason"].endswith("1.5 KiB as hidden states, 4.0 KiB as K and V")
    assert "without a plan hidden" in findings["method"]["reason"]
    assert findings["state directory"]["reason"].endswith("does not exist yet; a server makes it")
    assert findings["GPU"]["state"] == ("ok" if torch.cuda.is_available() else findings["GPU"]["state"])
    assert not [name for name, finding in findings.items() if "not built yet" in finding["reason"]]
    assert findings["SPDK"]["state"] == findings["GDRCopy"]["state"] == "off"
    assert not any(tmp_path.iterdir()), "it changes nothing"


def test_pinned_memory_is_tried_out(monkeypatch):
    class Refusing(Registrar):
        reason: str | None = None
        num_registered = 0

        def register(self, address: int, num_bytes: int) -> None:
            if self.reason is not None:
                raise OSError(self.reason)
            self.num_registered += 1

        def unregister(self, address: int) -> None:
            self.num_registered -= 1

    registrar = Refusing()
    monkeypatch.setattr(pinned, "pinned_memory", lambda: PinnedMemory(registrar, slab_bytes=2 << 20))
    finding = one(machine_checks.machine_checks(), "pinned memory")
    assert finding.state == "ok" and finding.reason.startswith("2.0 MiB were pinned at once, unverified")
    assert registrar.num_registered == 0, "and given back"
    registrar.reason = "no more"
    finding = one(machine_checks.machine_checks(), "pinned memory")
    assert finding.state == "problem" and "(no more)" in finding.reason and "memlock" in finding.advice
    monkeypatch.setattr(pinned, "pinned_memory", lambda: None)
    assert one(machine_checks.machine_checks(), "pinned memory").state == "off"


def test_a_namespace_is_called_experimental_wherever_it_is_chosen_or_there(monkeypatch, tmp_path):
    monkeypatch.setattr(nvme_checks, "why_no_spdk", lambda: None)
    monkeypatch.setattr(nvme_checks, "why_no_gdr", lambda: None)
    unverified = "experimental, unverified on hardware"
    assert unverified in one(nvme_checks.nvme_checks([tmp_path]), "SPDK").reason
    assert unverified in one(nvme_checks.nvme_checks([tmp_path]), "GDRCopy").reason
    (tmp_path / "namespace").write_text("trtype:PCIe traddr:0000:81:00.0")
    finding = one(nvme_checks.nvme_checks([tmp_path]), "SPDK")
    assert unverified in finding.reason and "0000:81:00.0" in finding.reason and not finding.prevents_serving
    monkeypatch.setattr(nvme_checks, "why_no_spdk", lambda: "built without SPDK")
    finding = one(nvme_checks.nvme_checks([tmp_path]), "SPDK")
    assert finding.prevents_serving and "built without SPDK" in finding.reason
    (tmp_path / "namespace").write_text("nonsense")
    assert one(nvme_checks.nvme_checks([tmp_path]), "SPDK").prevents_serving


def test_the_text_has_a_line_for_each_and_a_verdict(capsys, tmp_path):
    assert main(["doctor", "--state-dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("ok       python") for line in lines)
    assert any("the demo model); a token takes 3.0 KiB" in line for line in lines)
    assert lines[-1].startswith("A server can run")
    assert main(["doctor", "--state-dir", str(tmp_path), "--model", str(tmp_path / "nothing")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "A server cannot run: method."
    assert any(line.strip() == "-> check --model" for line in lines)


def test_grouped_query_models_save_kv(doctor, tiny_model):
    status, findings = doctor("--model", str(tiny_model("llama-gqa")))
    assert status == 0 and "without a plan kv" in findings["method"]["reason"]


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ('{"model_type": "mamba"}', "model type 'mamba' is not served"),
        ('{"model_type": "llama", "hidden_size": 8}', "model must be a folder"),
        ("[]", "model must be a folder"),
        ("{", "model must be a folder"),
    ],
)
def test_models_that_cannot_be_served(doctor, tmp_path, config, complaint):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(config)
    status, findings = doctor("--model", str(tmp_path / "model"))
    assert status == 1 and complaint in findings["method"]["reason"]
    assert findings["method"]["state"] == "problem"


def test_a_hub_id_that_is_not_here():
    with pytest.raises(ConfigError, match="got 'nobody/nothing'"):
        read_config("nobody/nothing")


def test_another_version_is_a_problem_and_a_missing_one_prevents(monkeypatch):
    monkeypatch.setattr(software_checks, "package_version", lambda name: "0.1")
    finding = one(software_checks.software_checks(None), "deepspeed")
    assert (finding.state, finding.prevents_serving) == ("problem", False)
    assert finding.reason == "0.1; only 0.19.8 was tried" and finding.advice == "pip install deepspeed==0.19.8"
    monkeypatch.setattr(software_checks, "package_version", lambda name: None)
    for name in ("torch", "deepspeed-mii", "transformers", "server"):
        finding = one(software_checks.software_checks(None), name)
        assert finding.prevents_serving and "bootstrap.sh" in finding.advice


def test_it_says_what_computes_and_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert one(software_checks.software_checks(None), "kernels").reason.startswith("plain torch, as there is no GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, state, words in (("torch", "problem", "Triton is not installed"), ("triton", "ok", "never run on a GPU")):
        monkeypatch.setattr(modules, "resolve", lambda kernels, device_type, name=name: name)
        finding = one(software_checks.software_checks(None), "kernels")
        assert finding.state == state and words in finding.reason and not finding.prevents_serving


def test_a_host_that_moved_a_name_prevents(monkeypatch):
    monkeypatch.setattr(compat, "missing_names", lambda: ["deepspeed.x:Y.z"])
    finding = one(software_checks.software_checks(None), "host's names")
    assert finding.prevents_serving and "missing, first deepspeed.x:Y.z" in finding.reason
    monkeypatch.setattr(compat, "missing_names", lambda: [])

    def refuse() -> None:
        raise HCacheError("a step of the installation failed")

    monkeypatch.setattr(compat, "install", refuse)
    assert one(software_checks.software_checks(None), "host's names").reason == "a step of the installation failed"


def test_several_state_directories(doctor, tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    given = ("--state-dir", str(a), "--state-dir", str(b))
    status, findings = doctor(*given)
    assert status == 0
    assert "2 directories on 1 file system" in findings["stripes"]["reason"]
    assert findings["stripes"]["state"] == "off"
    open_state([a, b], 1 << 22, 0).close()
    assert {path.name for path in b.iterdir()} >= {"set.json"}
    assert "a, not in use" in doctor(*given)[1]["state directory"]["reason"]
    assert "b, not in use" in doctor(*given)[1]["state directory 2"]["reason"]
    b.rename(tmp_path / "hidden")
    b.write_text("")
    status, findings = doctor(*given)
    assert status == 0, "a server does without it"
    assert findings["stripes"]["state"] == "problem" and str(b) in findings["stripes"]["reason"]
    status, findings = doctor("--state-dir", str(a), "--state-dir", str(a / "inside"))
    assert status == 1 and "inside" in findings["stripes"]["reason"]


def test_state_directories(doctor, tmp_path):
    state_dir = StateDir(tmp_path / "state")
    status, findings = doctor()
    assert status == 0 and findings["state directory"]["state"] == "ok"
    assert f"in use by the server with process id {os.getpid()}" in findings["state directory"]["reason"]
    state_dir.close()
    assert doctor()[1]["state directory"]["reason"].endswith(", not in use")
    assert doctor()[1]["O_DIRECT"]["state"] in ("ok", "off")
    (tmp_path / "file").write_text("")
    status, findings = doctor("--state-dir", str(tmp_path / "file"))
    assert status == 1 and findings["state directory"]["prevents_serving"]
    assert not list((tmp_path / "state").glob(".hcache*"))


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="needs a directory that nobody can write")
def test_a_directory_that_cannot_be_written(doctor):
    status, findings = doctor("--state-dir", "/proc/here")
    assert status == 1 and "/proc cannot be written" in findings["state directory"]["reason"]
    assert findings["O_DIRECT"]["state"] == findings["hole punching"]["state"] == "off"


def test_a_small_disk_and_one_that_is_memory(monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda path: usage(100 << 30, 99 << 30, 1 << 30))
    finding = one(state_checks.state_checks([tmp_path]), "disk")
    assert (finding.state, finding.prevents_serving) == ("problem", False)
    assert "1.0 GiB of 100.0 GiB free" in finding.reason and "--state-capacity" in finding.advice
    monkeypatch.setattr(state_checks, "filesystem_of", lambda path: "tmpfs")
    assert "all of it is memory" in one(state_checks.state_checks([tmp_path]), "disk").reason


def test_graphics_cards_that_torch_does_not_see(monkeypatch, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this one sees one")
    monkeypatch.setattr(machine_checks, "_DRIVER", tmp_path / "nothing")
    assert one(machine_checks.machine_checks(), "GPU").state == "off"
    monkeypatch.setattr(machine_checks, "_DRIVER", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", None)
    finding = one(machine_checks.machine_checks(), "GPU")
    assert finding.state == "problem" and "built for CPUs only" in finding.reason
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA 12.8 and finds no device (CUDA_VISIBLE_DEVICES is '')" in (
        one(machine_checks.machine_checks(), "GPU").reason
    )


def test_more_threads_than_a_container_may_use(monkeypatch, tmp_path):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    monkeypatch.setattr(machine_checks, "num_usable_cpus", lambda: 16)
    monkeypatch.setattr(machine_checks, "_CPU_MAX", tmp_path / "cpu.max")
    assert one(machine_checks.machine_checks(), "CPU").state == "ok"
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert one(machine_checks.machine_checks(), "CPU").state == "ok"
    (tmp_path / "cpu.max").write_text("400000 100000\n")
    finding = one(machine_checks.machine_checks(), "CPU")
    assert finding.state == "problem" and finding.advice.startswith("set OMP_NUM_THREADS=4:")


def test_what_is_slow_or_scarce_is_told(monkeypatch):
    monkeypatch.setattr(sys.modules["crc32c"], "hardware_based", False)
    assert one(machine_checks.machine_checks(), "crc32c").state == "off"
    monkeypatch.setattr(machine_checks, "cpu_features", lambda: ["avx2"])
    assert "avx2 at best" in one(machine_checks.machine_checks(), "16 bit on CPU").reason
    monkeypatch.setattr(machine_checks.HCacheConfig, "__init__", lambda self: None)
    monkeypatch.setattr(machine_checks.HCacheConfig, "dram_capacity_bytes", 1 << 50)
    assert "a server takes 1024.0 TiB" in one(machine_checks.machine_checks(), "memory").reason


def test_a_check_that_fails_is_a_finding():
    def explode() -> Finding:
        raise OSError("boom")

    first, second = find_out([("a", explode), ("b", lambda: ok("b", "fine"))], essential=True)
    assert (first.state, first.reason, first.prevents_serving) == (
        "problem",
        "could not be found out: OSError: boom",
        True,
    )
    assert second.state == "ok"
    assert not next(find_out([("a", explode)], essential=False)).prevents_serving


def test_filesystems_by_longest_mount_point():
    assert filesystem_of(Path("/proc/self")) == "proc"
    assert filesystem_of(Path("/proc/self")) != filesystem_of(Path(__file__))


def test_the_io_backend_and_why(monkeypatch, tmp_path):
    finding = dict(state_checks.state_checks([tmp_path]))["I/O"]
    monkeypatch.setenv("MII_HCACHE_IO", "threads")
    assert finding().reason == "threads: asked for"
    monkeypatch.delenv("MII_HCACHE_IO")
    monkeypatch.setattr(open_io, "why_no_uring", lambda: "there was no compiler")
    assert (finding().state, finding().reason) == ("off", "threads: there was no compiler")
    monkeypatch.setattr(open_io, "why_no_uring", lambda: None)
    assert finding().state == "ok" and finding().reason.startswith("uring: ")
    monkeypatch.setenv("MII_HCACHE_IO", "magic")
    assert finding().state == "problem"
