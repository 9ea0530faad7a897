// The engine: batches of reads and writes on one device, worked off by one thread with one queue.
//
//     submit → inbox → [ring thread] queue.enqueue … queue.submit … queue.reap → results → wait
//
// Short transfers are carried on, EINTR and EAGAIN are tried again, every other error is the request's own result.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "queue.hpp"

namespace hcache::io {

/// What to move. A target must not be forgotten by the device (`Device::forget`) before its requests are done.
struct Request {
    Op op;
    std::shared_ptr<Target> target;
    std::uint64_t offset;
    std::byte* data;
    std::uint64_t length;
};

class Batch;

/// A batch that was submitted. No request outlives its buffer: the destructor drops what has not begun and waits for
/// the rest, so buffers that outlive the Transfer are safe. Movable; waiting is for any thread.
class Transfer {
  public:
    explicit Transfer(std::shared_ptr<Batch> batch) : batch_(std::move(batch)) {}
    ~Transfer();
    Transfer(Transfer&&) = default;
    Transfer& operator=(Transfer&&) = delete;

    std::size_t size() const;
    /// Result of a request, once it is done: bytes moved, fewer than asked for only at the end of a file, or a negative
    /// errno (-ECANCELED when the device was closed first). Nothing when `timeout` passed.
    std::optional<std::int64_t> wait(std::size_t idx, std::chrono::milliseconds timeout) const;
    /// Whether all are done, at latest after `timeout`.
    bool wait_all(std::chrono::milliseconds timeout) const;

  private:
    std::shared_ptr<Batch> batch_;
};

/// Counted since the device was opened.
struct DeviceStats {
    std::uint64_t num_attempts = 0;
    std::uint64_t num_direct = 0;
    std::uint64_t num_carried_on = 0;
    std::uint64_t num_errors = 0;
};

/// One queue and one thread. Methods may be called from any thread. `submit` does not block; `run`, `forget` and
/// `close` do until the thread has come to it.
class Device {
  public:
    using MakeQueue = std::function<std::unique_ptr<Queue>()>;

    /// `make_queue` is called on the device's thread; what it throws is thrown here.
    explicit Device(const MakeQueue& make_queue);
    ~Device();
    Device(const Device&) = delete;
    Device& operator=(const Device&) = delete;

    Transfer submit(std::vector<Request> requests);
    /// Do something with the queue, on its thread; false when the device is closed.
    bool run(const std::function<void(Queue&)>& job);
    /// Before the last reference to a target goes. Requests in progress end well.
    void forget(Target& target);
    /// End early what was submitted so far: what has not begun as -ECANCELED, what is in flight if the device can. For
    /// a disk that hangs. Does not block.
    void cancel();
    /// What has not begun ends as -ECANCELED, what is in flight is waited for. Later batches end as -ECANCELED at once.
    /// Idempotent.
    void close();
    DeviceStats stats() const;

  private:
    struct Flight {
        std::shared_ptr<Batch> batch;
        std::size_t idx = 0;
        std::uint64_t moved = 0;
        unsigned num_tries = 0;
        std::uint32_t asked = 0;
        bool direct = false;
        bool cancelled = false;
    };
    struct Next {
        std::shared_ptr<Batch> batch;
        std::size_t idx = 0;
    };

    void work(const MakeQueue& make_queue, std::exception_ptr& failure);
    void loop();
    void take_inbox();
    void cancel_all();
    void start_waiting();
    void start(std::size_t slot);
    void handle(const Done& done);
    void finish(std::size_t slot, std::int64_t result);

    mutable std::mutex lock_;
    std::condition_variable changed_;
    std::vector<std::shared_ptr<Batch>> inbox_;
    std::vector<const std::function<void(Queue&)>*> jobs_;
    std::uint64_t num_jobs_asked_ = 0;
    std::uint64_t num_jobs_done_ = 0;
    bool started_ = false;
    bool cancelling_ = false;
    bool closing_ = false;
    bool closed_ = false;
    /// Others have to wake the thread. Set under the lock, when the inbox was emptied; cleared without it, because a
    /// wake-up too many costs little.
    std::atomic<bool> sleeping_{false};

    // the thread's own
    std::unique_ptr<Queue> queue_;
    std::deque<Next> waiting_;
    std::vector<Flight> flights_;
    std::vector<std::size_t> free_;
    bool ending_ = false;

    std::atomic<std::uint64_t> num_attempts_{0};
    std::atomic<std::uint64_t> num_direct_{0};
    std::atomic<std::uint64_t> num_carried_on_{0};
    std::atomic<std::uint64_t> num_errors_{0};

    std::mutex closing_lock_;
    std::thread thread_;
};

}  // namespace hcache::io
