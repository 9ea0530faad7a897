// The kernel around rope_scatter.cuh. A block of threads is one token: its angles are worked out once, in shared
// memory, for all heads. Never run on a GPU.
#include "rope_scatter.cuh"

using namespace hcache::gpu;

namespace {

/// Loads of values that a thread has under way before it stores the first.
constexpr unsigned kInFlight = 4;
/// Blocks of a multiprocessor at least: 1,024 threads with 64 registers each. (Left to itself, ptxas fits more of them
/// on sm_89 and spills for it.)
constexpr unsigned kMinBlocks = 8;

template <typename Number, unsigned kCount>
__device__ __forceinline__ void scatter(const RopeScatter& params) {
    using Work = Turning<Number, kCount>;
    __shared__ float sines[kMaxRotaryPairs], cosines[kMaxRotaryPairs];
    const std::int64_t token = blockIdx.x;
    const std::int64_t slot = at<const std::int64_t>(params.slots)[token];
    if (!is_sound(params, token)) __trap();
    const Work work(params);
    for (unsigned idx = threadIdx.x; idx < work.half; idx += kScatterThreads) {
        turn_of(params, token, idx, sines[idx], cosines[idx]);
    }
    const Head<Number> values = values_of<Number>(params, token, slot);
    const unsigned num_values = params.num_kv_heads * params.head_size / kCount;
    for (unsigned start = threadIdx.x; start < num_values; start += kInFlight * kScatterThreads) {
        typename Work::Elements elements[kInFlight];
        for (unsigned turn = 0; turn < kInFlight; ++turn) {
            const unsigned idx = start + turn * kScatterThreads;
            if (idx < num_values) elements[turn] = Work::load(values.from + idx * kCount);
        }
        for (unsigned turn = 0; turn < kInFlight; ++turn) {
            const unsigned idx = start + turn * kScatterThreads;
            if (idx < num_values) Work::store(values.to + idx * kCount, elements[turn]);
        }
    }
    __syncthreads();

    const unsigned lanes = work.num_lanes(), lane = threadIdx.x % lanes;
    const unsigned num_heads = params.num_heads + params.num_kv_heads;
    // Whole warps go on until all their heads are done: every lane takes part in the sums.
    const unsigned num_rounds = (num_heads * lanes + kScatterThreads - 1) / kScatterThreads;
    for (unsigned round = 0; round < num_rounds; ++round) {
        const unsigned idx = (round * kScatterThreads + threadIdx.x) / lanes;
        const bool is_head = idx < num_heads;
        const Head<Number> head = head_of<Number>(params, token, slot, is_head ? idx : 0);
        float scale = 0;
        if (params.q_gamma != 0 || params.k_gamma != 0) {
            float sum = is_head && head.gamma != nullptr ? work.squares(head, lane, lanes) : 0;
            for (unsigned offset = lanes / 2; offset != 0; offset /= 2) {
                sum = add_once(sum, __shfl_xor_sync(0xFFFFFFFF, sum, offset));
            }
            scale = work.scale_of(sum);
        }
        if (is_head) work.place(head, lane, lanes, scale, sines, cosines);
    }
}

}  // namespace

/// Grid: x is the token.
#define HCACHE_ENTRY(name, Number, kCount)                                                               \
    extern "C" __global__ void __launch_bounds__(kScatterThreads, kMinBlocks) name(RopeScatter params) { \
        scatter<Number, kCount>(params);                                                                 \
    }

HCACHE_ENTRY(hcache_rope_scatter_float16, Float16, 8)
HCACHE_ENTRY(hcache_rope_scatter_bfloat16, Bfloat16, 8)
HCACHE_ENTRY(hcache_rope_scatter_float32, Float32, 4)
HCACHE_ENTRY(hcache_rope_scatter_float16_unaligned, Float16, 1)
HCACHE_ENTRY(hcache_rope_scatter_bfloat16_unaligned, Bfloat16, 1)
HCACHE_ENTRY(hcache_rope_scatter_float32_unaligned, Float32, 1)
