// io_uring by its system calls: no library to install. Needs Linux 5.15 or newer.
#pragma once

#include <linux/io_uring.h>

#include <atomic>
#include <memory>
#include <vector>

#include "queue.hpp"

namespace hcache::io {

/// A descriptor that closes itself.
class Descriptor {
  public:
    explicit Descriptor(int fd = -1) : fd_(fd) {}
    ~Descriptor();
    Descriptor(Descriptor&& other) noexcept : fd_(other.fd_) { other.fd_ = -1; }
    Descriptor& operator=(Descriptor&&) = delete;
    int get() const { return fd_; }

  private:
    int fd_;
};

/// Memory that the kernel shares with us; unmapped at the end.
class Mapping {
  public:
    /// Throws std::system_error.
    Mapping(int fd, std::size_t num_bytes, std::uint64_t offset);
    ~Mapping();
    Mapping(const Mapping&) = delete;
    Mapping& operator=(const Mapping&) = delete;
    template <typename T>
    T* at(std::uint32_t offset) const {
        return reinterpret_cast<T*>(static_cast<std::byte*>(data_) + offset);
    }

  private:
    void* data_;
    std::size_t num_bytes_;
};

/// One ring. Files are registered at their first use, memory when it is lent; what cannot be registered (limits, older
/// kernels) is used unregistered, which costs CPU time and nothing else.
class UringQueue final : public Queue {
  public:
    /// Throws std::system_error: ENOSYS, EPERM or EACCES where io_uring is not to be had.
    explicit UringQueue(unsigned depth);
    ~UringQueue() override;

    unsigned depth() const override { return depth_; }
    void enqueue(const Attempt& attempt) override;
    void submit(bool wait) override;
    std::size_t reap(std::span<Done> out) override;
    void wake() override;
    void cancel() override;
    void forget(Target& target) override;
    bool lend(std::span<std::byte> memory) override;
    void take_back(std::span<std::byte> memory) override;

  private:
    struct Region {
        std::byte* start = nullptr;
        std::byte* stop = nullptr;
    };

    static Descriptor set_up(unsigned depth, io_uring_params& params);
    io_uring_sqe& next_entry();
    void listen();
    int slot_of(File& file, bool direct);
    int region_of(const Attempt& attempt) const;
    bool set_region(std::size_t idx, std::span<std::byte> memory);

    unsigned depth_;
    io_uring_params params_{};
    Descriptor ring_;
    Descriptor bell_;
    std::unique_ptr<Mapping> rings_;
    std::unique_ptr<Mapping> entries_;
    unsigned* sq_head_;
    unsigned* sq_tail_;
    unsigned* cq_head_;
    unsigned* cq_tail_;
    unsigned sq_mask_;
    unsigned cq_mask_;
    io_uring_cqe* cqes_;
    unsigned num_new_ = 0;
    std::uint64_t rung_ = 0;
    bool listening_ = false;
    std::vector<int> free_slots_;
    std::vector<Region> regions_;
};

/// Null when io_uring works here, else why not, for people.
const char* why_no_uring();

}  // namespace hcache::io
