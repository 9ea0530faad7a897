// Requests that were submitted together, and how they ended. Shared by the device's thread and whoever waits.
#pragma once

#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <optional>
#include <vector>

#include "device.hpp"

namespace hcache::io {

class Batch {
  public:
    explicit Batch(std::vector<Request> wanted)
        : requests(std::move(wanted)), results_(requests.size()), num_left_(requests.size()) {}

    const std::vector<Request> requests;
    /// Nobody wants the results any more: what has not begun need not begin.
    std::atomic<bool> dropped{false};

    /// REQUIRES: the request was not finished yet. The buffer may be gone when this returns.
    void finish(std::size_t idx, std::int64_t result) {
        const std::scoped_lock guard(lock_);
        results_[idx] = result;
        --num_left_;
        // those who want them all are woken once; a wake-up for each chunk would cost more than the chunk's I/O
        if (num_left_ == 0 || num_waiting_for_one_ > 0) done_.notify_all();
    }

    std::optional<std::int64_t> wait(std::size_t idx, std::chrono::milliseconds timeout) {
        std::unique_lock guard(lock_);
        ++num_waiting_for_one_;
        done_.wait_for(guard, timeout, [&] { return results_[idx].has_value(); });
        --num_waiting_for_one_;
        return results_[idx];
    }

    bool wait_all(std::chrono::milliseconds timeout) {
        std::unique_lock guard(lock_);
        return done_.wait_for(guard, timeout, [&] { return num_left_ == 0; });
    }

    void wait_forever() {
        std::unique_lock guard(lock_);
        done_.wait(guard, [&] { return num_left_ == 0; });
    }

  private:
    std::mutex lock_;
    std::condition_variable done_;
    std::vector<std::optional<std::int64_t>> results_;
    std::size_t num_left_;
    unsigned num_waiting_for_one_ = 0;
};

}  // namespace hcache::io
