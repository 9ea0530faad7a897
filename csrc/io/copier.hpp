// The DRAM tier's engine: copies by several threads. Memory never goes through a ring, which would only add to the
// copy.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <memory>
#include <mutex>
#include <span>
#include <thread>
#include <vector>

namespace hcache::io {

/// `num_runs` runs of `length` bytes each: run i goes from source + i * source_stride to target + i * target_stride.
/// One contiguous copy by default; a sequence's rows of all layers when strided. No target overlaps any source or
/// target.
struct Copy {
    std::byte* target;
    const std::byte* source;
    std::size_t length;
    std::size_t num_runs = 1;
    std::ptrdiff_t target_stride = 0;
    std::ptrdiff_t source_stride = 0;
};

/// A thread more for each so many bytes beyond the first. Waking one and waiting for it was measured to cost 7 to 15 us
/// of CPU time, as much as copying 200 KiB: a decode step of a few sequences, which nobody waits for, is left to its
/// caller.
inline constexpr std::size_t kBytesPerThread = std::size_t{1} << 20;

/// A few threads that copy. `run` may be called from any thread, also by several at once.
class Copier {
  public:
    /// At most `num_threads` work on one call's copies, its caller among them; fewer on few bytes.
    explicit Copier(unsigned num_threads, std::size_t bytes_per_thread = kBytesPerThread);
    ~Copier();
    Copier(const Copier&) = delete;
    Copier& operator=(const Copier&) = delete;

    /// Returns when all bytes are copied. The memory is the caller's, who keeps it alive until then; it is not touched
    /// after the return, also not by a helper that comes late. Throws std::bad_alloc before any byte was copied.
    void run(std::span<const Copy> copies);

  private:
    struct Work;
    void work();

    const std::size_t bytes_per_thread_;
    std::mutex lock_;
    std::condition_variable wanted_;
    std::vector<std::shared_ptr<Work>> queue_;
    bool ending_ = false;
    std::vector<std::thread> threads_;
};

}  // namespace hcache::io
