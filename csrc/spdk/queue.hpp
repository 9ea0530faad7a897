// One NVMe queue pair, polled by the engine's own thread. io/device.hpp makes batches of it, as of any queue.
//
//     enqueue → waiting → [qpair: at most `depth`] → poll → done → ended → reap
//
// * Offsets and lengths are whole sectors; anything else is -EINVAL, because nothing here reads to modify.
// * An attempt moves at most kMaxAttemptBytes; the engine carries on. What is longer than the device's own limit is
// split
//   by SPDK, whose parts are in flight together.
// * Memory that the device cannot reach is copied through a few buffers of SPDK's.
// * A qpair that fails is freed, which ends what was in flight as -EIO; a later attempt makes a new one, at most one
//   every second. Others end as -ENODEV until then.
// * While anything is in flight the thread polls without sleep, as SPDK does: a core of its own, only then.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "../io/queue.hpp"
#include "controller.hpp"
#include "memory.hpp"

namespace hcache::spdk {

/// Bytes that go through one of SPDK's buffers at a time, where the caller's memory cannot be used.
inline constexpr std::uint32_t kBounceBytes = 256U << 10;

class SpdkQueue final : public io::Queue {
  public:
    /// As deep as the controller was connected for. Throws std::runtime_error when there is no qpair to be had.
    explicit SpdkQueue(std::shared_ptr<Controller> controller);
    ~SpdkQueue() override;

    unsigned depth() const override { return static_cast<unsigned>(flights_.size()); }
    void enqueue(const io::Attempt& attempt) override;
    void submit(bool wait) override;
    std::size_t reap(std::span<io::Done> out) override;
    void wake() override;
    /// What is in flight has a fifth of a second to end by itself; then the qpair goes, and with it what came later.
    void cancel() override;
    /// Of writes that were reaped before. -ETIMEDOUT after half a minute, and then the qpair is gone.
    int flush(io::Target& target) override;
    /// False when the device cannot reach the memory: then it is copied.
    bool lend(std::span<std::byte> memory) override;
    void take_back(std::span<std::byte> memory) override;

    /// Memory that was registered and proven elsewhere (a GPU's): used in place until it is removed.
    void add_region(std::span<std::byte> memory);
    /// Polls until nothing is in flight on it. REQUIRES: no attempt on it begins later.
    void remove_region(std::span<std::byte> memory);
    /// Attempts that were copied so far.
    std::uint64_t num_bounced() const { return num_bounced_.load(std::memory_order_relaxed); }

  private:
    using Clock = std::chrono::steady_clock;

    struct Flight : Command {
        SpdkQueue* queue = nullptr;
        io::Attempt attempt{};
        DmaBuffer* bounce = nullptr;
        bool flying = false;
        bool cancelled = false;
    };

    static void on_done(Command& command, int error);
    void start_waiting();
    bool start(Flight& flight);
    int hand_over(Flight& flight, std::byte* data);
    void end(Flight& flight, std::int64_t result);
    bool reaches(const io::Attempt& attempt) const;
    bool fill_bounce(Flight& flight);
    bool has_qpair();
    void poll();
    void drop_qpair();
    void sleep();

    std::shared_ptr<Controller> controller_;
    const Ops& ops_;
    Qpair* qpair_ = nullptr;
    std::vector<Flight> flights_;
    std::vector<Flight*> free_;
    std::deque<Flight*> waiting_;
    std::deque<io::Done> ended_;
    std::size_t num_flying_ = 0;
    std::vector<std::unique_ptr<DmaBuffer>> bounces_;
    std::vector<DmaBuffer*> free_bounces_;
    std::vector<std::unique_ptr<Registration>> lent_;
    std::vector<std::span<std::byte>> regions_;
    Clock::time_point next_qpair_at_{};
    Clock::time_point next_admin_at_{};
    Clock::time_point cancel_at_ = Clock::time_point::max();
    std::atomic<std::uint64_t> num_bounced_{0};

    std::mutex lock_;
    std::condition_variable bell_;
    std::atomic<bool> rung_{false};
};

}  // namespace hcache::spdk
