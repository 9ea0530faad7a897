// The kernels of csrc/gpu for fake_cuda.cpp: found by name, fed by a launch's arguments, run as the same source on the
// CPU. What a GPU would answer with a trap or a fault that ends the context ends the program here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

#include "../../../csrc/gpu/crc32c.cuh"
#include "../../../csrc/gpu/rope_scatter.cuh"
#include "fake_state.hpp"

namespace fake {

using namespace hcache::gpu;

/// Where the bytes that a kernel touches really are.
void* reach(std::uint64_t address, std::uint64_t num_bytes);

struct Launch {
    unsigned grid_x, grid_y, block_x;
    void** arguments;
};
/// Takes a launch's arguments at once, and gives what is to run when the stream has come to it.
using Kernel = std::function<void()> (*)(const Launch& launch);

inline std::function<void()> checksum(const Launch& launch) {
    std::uint64_t address;
    std::memcpy(&address, launch.arguments[0], sizeof address);
    const Powers powers = *static_cast<const Powers*>(launch.arguments[1]);
    const unsigned grid_x = launch.grid_x, grid_y = launch.grid_y, block_x = launch.block_x;
    if (block_x % 32 != 0) misuse("the checksum's blocks are no whole warps");
    return [=] {
        static const auto* const tables = [] {
            auto* const made = new std::uint32_t[kNumTables][kNumEntries];
            for (unsigned idx = 0; idx < kNumTables; ++idx) {
                for (unsigned byte = 0; byte < kNumEntries; ++byte) made[idx][byte] = table_entry(idx, byte);
            }
            return made;
        }();
        auto* const pieces = static_cast<Piece*>(reach(address, grid_y * sizeof(Piece)));
        for (unsigned y = 0; y < grid_y; ++y) {
            Piece& piece = pieces[y];
            if (piece.num_bytes == 0) continue;
            const auto* const bytes = static_cast<const unsigned char*>(reach(piece.address, piece.num_bytes));
            for (std::uint64_t slice = 0; slice < std::uint64_t{grid_x} * block_x; ++slice) {
                if (slice >= num_slices(piece.num_bytes)) break;
                piece.crc ^= share_of(tables, powers, bytes, piece.num_bytes, slice);
            }
        }
    };
}

template <typename Number, unsigned kCount>
std::function<void()> rope_scatter(const Launch& launch) {
    constexpr std::uint64_t kElement = sizeof(typename Number::Bits);
    RopeScatter params = *static_cast<const RopeScatter*>(launch.arguments[0]);
    if (launch.grid_x != params.num_tokens || launch.grid_y != 1 || launch.block_x != kScatterThreads) {
        misuse("a block of rope_scatter is one token");
    }
    if (!fits_vectors(params, kElement, kCount)) misuse("rope_scatter's vectors are not aligned");
    return [params]() mutable {
        const std::uint64_t num_tokens = static_cast<std::uint64_t>(params.num_tokens), head_size = params.head_size;
        const std::uint64_t row = (params.num_heads + 2 * std::uint64_t{params.num_kv_heads}) * head_size;
        const auto move = [](std::uint64_t& address, std::uint64_t num_bytes) {
            if (address != 0) address = reinterpret_cast<std::uint64_t>(reach(address, num_bytes));
        };
        move(params.rows, ((num_tokens - 1) * static_cast<std::uint64_t>(params.row_stride) + row) * kElement);
        move(params.cache,
             static_cast<std::uint64_t>(params.num_slots) * 2 * params.num_kv_heads * head_size * kElement);
        const std::uint64_t half = params.rotary_dim / 2;
        move(params.sines, static_cast<std::uint64_t>(params.num_positions) * half * sizeof(float));
        move(params.cosines, static_cast<std::uint64_t>(params.num_positions) * half * sizeof(float));
        move(params.inv_freq, half * sizeof(float));
        move(params.positions, num_tokens * sizeof(std::int64_t));
        move(params.slots, num_tokens * sizeof(std::int64_t));
        move(params.q_gamma, head_size * kElement);
        move(params.k_gamma, head_size * kElement);
        for (std::int64_t token = params.num_tokens - 1; token >= 0; --token) {
            if (!place_token<Number, kCount>(params, token))
                misuse("a slot outside the cache, or a position outside the tables: trap");
        }
    };
}

inline const struct {
    const char* name;
    Kernel kernel;
} kKernels[] = {
    {kKernelName, checksum},
    {"hcache_rope_scatter_float16", rope_scatter<Float16, 8>},
    {"hcache_rope_scatter_bfloat16", rope_scatter<Bfloat16, 8>},
    {"hcache_rope_scatter_float32", rope_scatter<Float32, 4>},
    {"hcache_rope_scatter_float16_unaligned", rope_scatter<Float16, 1>},
    {"hcache_rope_scatter_bfloat16_unaligned", rope_scatter<Bfloat16, 1>},
    {"hcache_rope_scatter_float32_unaligned", rope_scatter<Float32, 1>},
};

}  // namespace fake
