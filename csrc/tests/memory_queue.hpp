// A device in memory whose script decides how each attempt ends: the ops table of tests.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "../io/device.hpp"
#include "../io/faults.hpp"

namespace hcache::io::test {

/// A file to hand to requests; what is in it does not matter to a MemoryQueue.
inline std::shared_ptr<File> some_file() {
    const int fd = ::memfd_create("test", MFD_CLOEXEC);
    auto file = std::make_shared<File>(fd);
    ::close(fd);
    return file;
}

/// Shared with the test, which outlives the queue.
struct Disk {
    std::vector<std::byte> bytes;
    /// What becomes of an attempt; kPass by default. On the queue's thread.
    Fault script = [](const Attempt&) { return kPass; };
    /// Attempts end in another order than they came.
    bool reversed = false;
    /// Nothing ends before this was cleared and `Device::run` woke the thread, or before a cancellation.
    std::atomic<bool> held{false};
    std::atomic<unsigned> num_enqueued{0};
    std::atomic<unsigned> most_in_flight{0};
    std::atomic<bool> cancelled{false};
};

class MemoryQueue final : public Queue {
  public:
    MemoryQueue(Disk& disk, unsigned depth) : disk_(disk), depth_(depth) {}

    unsigned depth() const override { return depth_; }
    void enqueue(const Attempt& attempt) override {
        ++disk_.num_enqueued;
        flying_.push_back(attempt);
        CHECK(flying_.size() <= depth_);
        disk_.most_in_flight = std::max<unsigned>(disk_.most_in_flight, static_cast<unsigned>(flying_.size()));
    }
    void submit(bool wait) override {
        std::unique_lock guard(lock_);
        if (wait) bell_.wait(guard, [&] { return rung_ || (!flying_.empty() && !is_held()); });
        rung_ = false;
    }
    std::size_t reap(std::span<Done> out) override {
        std::size_t num = 0;
        while (num < out.size() && !flying_.empty() && !is_held()) {
            const auto next = disk_.reversed ? flying_.end() - 1 : flying_.begin();
            out[num++] = {next->token, move(*next)};
            flying_.erase(next);
        }
        return num;
    }
    void wake() override {
        const std::scoped_lock guard(lock_);
        rung_ = true;
        bell_.notify_one();
    }
    void cancel() override { disk_.cancelled = true; }

  private:
    bool is_held() const { return disk_.held && !disk_.cancelled; }
    std::int64_t move(const Attempt& attempt) {
        if (disk_.cancelled) return -ECANCELED;
        const std::int64_t verdict = disk_.script(attempt);
        if (verdict <= 0) return verdict;
        const std::uint64_t start = std::min<std::uint64_t>(attempt.offset, disk_.bytes.size());
        const std::uint64_t most = std::min<std::uint64_t>(static_cast<std::uint64_t>(verdict), attempt.length);
        const std::uint64_t num = std::min<std::uint64_t>(most, disk_.bytes.size() - start);
        if (num == 0) return 0;
        if (attempt.op == Op::read) {
            std::memcpy(attempt.data, &disk_.bytes[start], num);
        } else {
            std::memcpy(&disk_.bytes[start], attempt.data, num);
        }
        return static_cast<std::int64_t>(num);
    }

    Disk& disk_;
    unsigned depth_;
    std::vector<Attempt> flying_;
    std::mutex lock_;
    std::condition_variable bell_;
    bool rung_ = false;
};

inline Device::MakeQueue on(Disk& disk, unsigned depth = 4) {
    return [&disk, depth] { return std::make_unique<MemoryQueue>(disk, depth); };
}

}  // namespace hcache::io::test
