// Faults for tests: a queue that asks a function before each attempt what is to become of it.
#pragma once

#include <cerrno>
#include <chrono>
#include <functional>
#include <limits>
#include <memory>
#include <thread>
#include <vector>

#include "queue.hpp"

namespace hcache::io {

/// No fault: the attempt goes on as it is.
inline constexpr std::int64_t kPass = std::numeric_limits<std::int64_t>::max();
/// A delay: the attempt waits, and is asked about again and again, while others go on.
inline constexpr std::int64_t kHold = kPass - 1;
/// A delay that no cancellation ends: a disk that hangs.
inline constexpr std::int64_t kStuck = kPass - 2;
/// Called on the queue's thread. Returns kPass, kHold, kStuck, a negative errno, or how many bytes to move.
using Fault = std::function<std::int64_t(const Attempt&)>;

class FaultyQueue final : public Queue {
  public:
    FaultyQueue(std::unique_ptr<Queue> inner, Fault fault) : inner_(std::move(inner)), fault_(std::move(fault)) {}

    Queue& inner() { return *inner_; }

    unsigned depth() const override { return inner_->depth(); }
    void enqueue(const Attempt& attempt) override {
        const std::int64_t verdict = fault_(attempt);
        if (verdict == kHold || verdict == kStuck) {
            held_.push_back({attempt, verdict == kStuck});
            return;
        }
        if (verdict <= 0) {
            made_up_.push_back({attempt.token, verdict});
            return;
        }
        Attempt rest = attempt;
        if (verdict < rest.length) rest.length = static_cast<std::uint32_t>(verdict);
        inner_->enqueue(rest);
    }
    void submit(bool wait) override {
        if (!held_.empty()) {
            inner_->submit(false);
            std::this_thread::sleep_for(std::chrono::milliseconds(1));
            std::vector<Held> again;
            again.swap(held_);
            for (const Held& held : again) enqueue(held.attempt);
        }
        inner_->submit(wait && made_up_.empty() && held_.empty());
    }
    std::size_t reap(std::span<Done> out) override {
        std::size_t num = 0;
        for (; num < out.size() && !made_up_.empty(); made_up_.pop_back()) out[num++] = made_up_.back();
        return num + inner_->reap(out.subspan(num));
    }
    void wake() override { inner_->wake(); }
    void cancel() override {
        std::vector<Held> all;
        all.swap(held_);
        for (const Held& held : all) {
            if (held.stuck) {
                held_.push_back(held);
            } else {
                made_up_.push_back({held.attempt.token, -ECANCELED});
            }
        }
        inner_->cancel();
    }
    void forget(Target& target) override { inner_->forget(target); }
    int flush(Target& target) override { return inner_->flush(target); }
    bool lend(std::span<std::byte> memory) override { return inner_->lend(memory); }
    void take_back(std::span<std::byte> memory) override { inner_->take_back(memory); }

  private:
    struct Held {
        Attempt attempt;
        bool stuck;
    };

    std::unique_ptr<Queue> inner_;
    Fault fault_;
    std::vector<Done> made_up_;
    std::vector<Held> held_;
};

}  // namespace hcache::io
