// Requests that were submitted together, and how they ended. Shared by the device's thread and whoever waits.
#pragma once

#include <array>
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
        // only whom it concerns: waking everybody for each chunk would cost more than the chunk's I/O
        if (num_left_ == 0) all_done_.notify_all();
        Seat& seat = seats_[idx % seats_.size()];
        if (seat.num_waiting > 0) seat.done.notify_all();
    }

    std::optional<std::int64_t> wait(std::size_t idx, std::chrono::milliseconds timeout) {
        std::unique_lock guard(lock_);
        if (results_[idx]) return results_[idx];
        Seat& seat = seats_[idx % seats_.size()];
        ++seat.num_waiting;
        seat.done.wait_for(guard, timeout, [&] { return results_[idx].has_value(); });
        --seat.num_waiting;
        return results_[idx];
    }

    bool wait_all(std::chrono::milliseconds timeout) {
        std::unique_lock guard(lock_);
        return all_done_.wait_for(guard, timeout, [&] { return num_left_ == 0; });
    }

    void wait_forever() {
        std::unique_lock guard(lock_);
        all_done_.wait(guard, [&] { return num_left_ == 0; });
    }

  private:
    /// Where waiters for a few of the requests wait.
    struct Seat {
        std::condition_variable done;
        unsigned num_waiting = 0;
    };

    std::mutex lock_;
    std::condition_variable all_done_;
    std::array<Seat, 16> seats_;
    std::vector<std::optional<std::int64_t>> results_;
    std::size_t num_left_;
};

}  // namespace hcache::io
