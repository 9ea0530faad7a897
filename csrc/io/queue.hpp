// The seam below the engine: what a device's own queue of commands can do. io_uring, SPDK, and faults in tests. The
// engine above it (device.hpp) knows batches, short transfers, retries and threads; a queue knows none.
#pragma once

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <span>

#include "file.hpp"

namespace hcache::io {

enum class Op : std::uint8_t { read, write };

/// One command to the device. The memory is the caller's and stays valid until the attempt was reaped.
struct Attempt {
    Op op;
    Target* target;
    std::uint64_t offset;
    std::byte* data;
    std::uint32_t length;
    std::uint64_t token;
};

/// How an attempt ended: bytes moved, which may be fewer than asked for, or a negative errno.
struct Done {
    std::uint64_t token;
    std::int64_t result;
};

/// A queue of one device. Made, used and destroyed on one thread; `wake` alone is for any thread.
class Queue {
  public:
    Queue() = default;
    Queue(const Queue&) = delete;
    Queue& operator=(const Queue&) = delete;
    /// REQUIRES: every attempt was reaped.
    virtual ~Queue() = default;

    /// Most attempts that may be in flight.
    virtual unsigned depth() const = 0;
    /// REQUIRES: fewer than `depth()` in flight.
    virtual void enqueue(const Attempt& attempt) = 0;
    /// Hand over what was enqueued. With `wait`, sleep until something can be reaped or `wake` was called.
    virtual void submit(bool wait) = 0;
    /// Take up to `out.size()` ended attempts; how many. Does not sleep.
    virtual std::size_t reap(std::span<Done> out) = 0;
    /// End a `submit(true)`, also one that begins only later. Any thread.
    virtual void wake() = 0;
    /// Ask the device to end what is in flight early; every attempt is still reaped.
    virtual void cancel() = 0;

    /// Before a target's last use. Attempts in flight may go on.
    virtual void forget(Target&) {}
    /// Make what was written to a target durable; 0 or a negative errno. Blocks. For targets that the kernel cannot
    /// sync.
    virtual int flush(Target&) { return -ENOTSUP; }
    /// Tell the device of memory that will be used often. False when it cannot; transfers work all the same.
    virtual bool lend(std::span<std::byte>) { return false; }
    /// Take memory back. REQUIRES: no attempt on it is in flight.
    virtual void take_back(std::span<std::byte>) {}
};

}  // namespace hcache::io
