// Enough of CUDA's C++ for a .cu file to run on the CPU, included behind this: a block's threads are threads, barriers
// are barriers, and a warp's lanes wait for each other where they exchange. A lane that does not come to an exchange
// hangs the test; shared memory that is read too early is a race for the thread sanitizer.
#pragma once

#include <barrier>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

namespace emulated {

inline constexpr unsigned kWarp = 32;
struct Index {
    unsigned x;
};
struct Warp {
    std::barrier<> meeting{kWarp};
    float values[kWarp] = {};
};

inline thread_local Warp* warp = nullptr;
inline thread_local std::barrier<>* block = nullptr;

}  // namespace emulated

inline thread_local emulated::Index threadIdx{0}, blockIdx{0};

inline void __syncthreads() {
    emulated::block->arrive_and_wait();
}

inline float __shfl_xor_sync(unsigned, float value, unsigned offset) {
    emulated::Warp& warp = *emulated::warp;
    const unsigned lane = threadIdx.x % emulated::kWarp;
    warp.values[lane] = value;
    warp.meeting.arrive_and_wait();
    const float other = warp.values[lane ^ offset];
    warp.meeting.arrive_and_wait();
    return other;
}

[[noreturn]] inline void __trap() {
    std::abort();
}

namespace emulated {

/// `kernel()` by every thread of every block, one block after the other. `num_threads`: whole warps.
template <typename Kernel>
void launch(unsigned num_blocks, unsigned num_threads, Kernel kernel) {
    std::barrier<> all(num_threads);
    std::vector<std::unique_ptr<Warp>> warps;
    for (unsigned idx = 0; idx < num_threads / kWarp; ++idx) warps.push_back(std::make_unique<Warp>());
    std::vector<std::thread> threads;
    for (unsigned idx = 0; idx < num_threads; ++idx) {
        threads.emplace_back([&, idx] {
            threadIdx.x = idx;
            warp = warps[idx / kWarp].get();
            block = &all;
            for (blockIdx.x = 0; blockIdx.x < num_blocks; ++blockIdx.x) {
                kernel();
                all.arrive_and_wait();
            }
        });
    }
    for (std::thread& thread : threads) thread.join();
}

}  // namespace emulated
