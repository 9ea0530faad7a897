// The kernel around crc32c.cuh. Compiled to a fat binary (mii_hcache/_gpu.fatbin) that the CUDA driver loads at run
// time: nothing is linked against CUDA.
#include "crc32c.cuh"

using namespace hcache::gpu;

/// pieces: [num_pieces], in device memory. Grid: x covers the slices of the longest piece, y is the piece.
extern "C" __global__ void __launch_bounds__(kThreadsPerBlock) hcache_crc32c(Piece* pieces, Powers powers) {
    __shared__ std::uint32_t tables[kNumTables][kNumEntries];
    for (unsigned entry = threadIdx.x; entry < kNumTables * kNumEntries; entry += blockDim.x) {
        tables[entry / kNumEntries][entry % kNumEntries] = table_entry(entry / kNumEntries, entry % kNumEntries);
    }
    __syncthreads();
    Piece& piece = pieces[blockIdx.y];
    const std::uint64_t num_bytes = piece.num_bytes;
    const std::uint64_t slice_idx = std::uint64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    std::uint32_t share = 0;
    if (slice_idx < num_slices(num_bytes)) {
        share = share_of(tables, powers, reinterpret_cast<const unsigned char*>(piece.address), num_bytes, slice_idx);
    }
    share = __reduce_xor_sync(0xFFFFFFFF, share);
    if (threadIdx.x % 32 == 0 && share != 0) atomicXor(&piece.crc, share);
}
