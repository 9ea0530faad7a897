#include "placing.hpp"

#include <limits>
#include <stdexcept>
#include <string>

namespace hcache::gpu {
namespace {

void check(bool is_right, const char* what) {
    if (!is_right) throw std::invalid_argument(what);
}

void check(const RopeScatter& params, unsigned element_bytes) {
    check(params.num_kv_heads > 0 && params.head_size > 0, "no head takes a place");
    check(params.rotary_dim % 2 == 0 && params.rotary_dim <= params.head_size, "rotary_dim is odd or beyond the head");
    check(params.rotary_dim / 2 <= kMaxRotaryPairs, "rotary_dim is above 512");
    check((params.sines == 0) == (params.cosines == 0), "sines without cosines");
    check(params.rotary_dim == 0 || params.sines != 0 || params.inv_freq != 0, "there are no angles");
    const std::int64_t num_heads = std::int64_t{params.num_heads} + 2 * std::int64_t{params.num_kv_heads};
    check(num_heads <= 1 << 16 && params.head_size <= 1 << 16, "heads are too many, or too large");
    check(params.row_stride >= num_heads * params.head_size || params.num_tokens == 1, "rows overlap");
    check(params.num_tokens <= std::numeric_limits<std::int32_t>::max(), "more tokens than a grid has blocks");
    check(params.rows != 0 && params.cache != 0 && params.positions != 0 && params.slots != 0, "an address is null");
    check(fits_vectors(params, element_bytes, 1), "an address is not aligned to its elements");
    check((params.inv_freq | params.sines | params.cosines) % sizeof(float) == 0 &&
              (params.positions | params.slots) % sizeof(std::int64_t) == 0,
          "an address is not aligned to its elements");
}

}  // namespace

void place_rows(Kernels& kernels, RopeScatter params, NumberKind kind, Handle stream) {
    if (params.num_tokens == 0) return;
    const unsigned element_bytes = kind == NumberKind::float32 ? 4 : 2;
    check(params, element_bytes);
    std::string name = "hcache_rope_scatter_";
    name += kind == NumberKind::float16 ? "float16" : kind == NumberKind::bfloat16 ? "bfloat16" : "float32";
    if (!fits_vectors(params, element_bytes, kVectorBytes / element_bytes)) name += "_unaligned";
    void* arguments[] = {&params};
    kernels.launch(name, static_cast<unsigned>(params.num_tokens), 1, kScatterThreads, arguments, stream);
}

}  // namespace hcache::gpu
