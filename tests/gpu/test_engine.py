"""Models of the middle size on the device: restored state is within the engine's own noise, K and V the same bits."""

from __future__ import annotations

from dataclasses import replace

import pytest

from experiments.gpu_restore import gate, soak
from experiments.gpu_restore.scales import H200, Model
from mii_hcache.tools import selfcheck

MODELS = {
    "mha": Model(shape="250m", dtype="float16", contexts=(2048,), pool_tokens=16384, gate_layers=16),
    "gqa": Model(
        shape="250m",
        dtype="float16",
        contexts=(2048,),
        pool_tokens=16384,
        gate_layers=8,
        changes={"num_key_value_heads": 4},
    ),
    "llama3-8b": Model(shape="llama3-8b", dtype="bfloat16", contexts=(2048,), pool_tokens=16384, gate_layers=3),
}
SCALE = replace(
    H200,
    gate_tokens=1024,
    gate_ragged=(65, 700),
    beside_tokens=0,
    decode_batches=(4,),
    store_bytes=8 << 30,
    flush_bytes=1 << 20,
)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", MODELS)
def test_restored_state_is_within_the_engines_noise(name, dtype):
    for number in gate.check(MODELS[name], SCALE, dtype):  # raises when it is not
        print(f"{number.series}, {number.x} tokens: {number.y:.4g}")


def test_restores_beside_decoding(tmp_path):
    model = MODELS["mha"]
    arguments = {"cycles": soak.BATCH_CYCLES, "deadline_s": 60.0, "seed": 1, "layers": 4}
    assert soak.run(model, SCALE, out=tmp_path / "soak.jsonl", **arguments) == soak.BATCH_CYCLES


def test_the_selfcheck(capsys):
    assert selfcheck.main(["--dtype", "float16", "--history", "1024", "--seconds", "20"]) == 0
    print(capsys.readouterr().out)
