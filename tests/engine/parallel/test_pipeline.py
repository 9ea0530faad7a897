"""`mii_hcache.pipeline(..., tensor_parallel=2)`: two turns, evicted in between, as from one process."""

from __future__ import annotations

import mii_hcache
from mii_hcache.engine.demo_model import ensure_demo_model

STORY = "The sailor remembers the lighthouse. " * 12


def test_a_pipeline_over_two_ranks_restores_and_says_what_one_says(tmp_path):
    model, said = ensure_demo_model(tmp_path / "model"), {}
    for size in (1, 2):
        with mii_hcache.pipeline(
            model,
            state_dir=str(tmp_path / f"state-{size}"),
            tensor_parallel=size,
            method="hidden",
            keep="none",
            dtype="float32",
            kv_blocks=100,
            dram_capacity_bytes=32 << 20,
        ) as pipe:
            [first] = pipe(STORY, max_new_tokens=6, do_sample=False, ignore_eos=True)
            [second] = pipe(
                STORY + first.generated_text + " And then?", max_new_tokens=6, do_sample=False, ignore_eos=True
            )
        assert second.hcache.restored_tokens >= 64 and second.hcache.method == "hidden"
        said[size] = first.generated_text, second.generated_text, second.hcache.restored_tokens
    assert said[1] == said[2]
