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

/// `length` bytes from `source` to `target`, which do not overlap.
struct Copy {
    std::byte* target;
    const std::byte* source;
    std::size_t length;
};

/// A few threads that copy. `run` may be called from any thread, also by several at once.
class Copier {
  public:
    /// `num_threads` work on one call's copies, its caller among them.
    explicit Copier(unsigned num_threads);
    ~Copier();
    Copier(const Copier&) = delete;
    Copier& operator=(const Copier&) = delete;

    /// Returns when all bytes are copied. The memory is the caller's.
    void run(std::span<const Copy> copies);

  private:
    struct Work;
    void work();

    std::mutex lock_;
    std::condition_variable wanted_;
    std::vector<std::shared_ptr<Work>> queue_;
    bool ending_ = false;
    std::vector<std::thread> threads_;
};

}  // namespace hcache::io
