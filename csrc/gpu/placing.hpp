// rope_scatter.cuh on a GPU. Never run on one.
#pragma once

#include "kernels.hpp"
#include "rope_scatter.cuh"

namespace hcache::gpu {

enum class NumberKind { float16, bfloat16, float32 };

/// Queue one launch on `stream` as `Kernels::launch` does; nothing for no tokens. Throws std::invalid_argument for
/// sizes and strides that cannot be; addresses are the caller's word.
void place_rows(Kernels& kernels, RopeScatter params, NumberKind kind, Handle stream);

}  // namespace hcache::gpu
