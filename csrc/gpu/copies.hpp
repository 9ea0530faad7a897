// Many copies from the host to a GPU at a time: by one call of the driver for hundreds of them where it has such a call
// (cuMemcpyBatchAsync, CUDA 12.8 and later), else by one call each. Never run on a GPU.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "gpu.hpp"

namespace hcache::gpu {

struct Copy {
    Address to;
    std::uint64_t from;
    std::uint64_t num_bytes;
};

/// `copies` without empty ones, neighbours that adjoin on both sides as one: drivers do not merge, and a transfer below
/// some 64 KiB does not fill the bus.
std::vector<Copy> merged(std::span<const Copy> copies);

/// Any thread.
class Copies {
  public:
    /// Most copies of one call of the driver. A stream's queue holds about a thousand; a longer list is several calls.
    static constexpr std::size_t kMaxPerCall = 256;

    explicit Copies(std::shared_ptr<Gpu> gpu);

    /// For people.
    const char* how() const;
    /// Queue them on `stream`, any of this GPU's primary context, in no order among themselves: targets do not overlap.
    /// Sources are read when the stream has come to them; both sides stay as they are until an event behind them on the
    /// stream. Returns how many copies were left after merging. Does not wait for them, but the driver makes a thread
    /// wait whose stream's queue is full. Throws std::runtime_error; then some may have been queued.
    std::size_t run(std::span<const Copy> copies, Handle stream);

  private:
    Result try_run(std::span<const Copy> copies, Handle stream);
    Result batch(std::span<const Copy> copies, Handle stream) const;

    const std::shared_ptr<Gpu> gpu_;
    const BatchCopy13 batch_13_;
    const BatchCopy12 batch_12_;
    std::atomic<bool> is_batch_refused_ = false;
};

}  // namespace hcache::gpu
