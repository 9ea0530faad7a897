// An open file as the engine uses it: once through the page cache and, where the file system allows, once around it.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace hcache::io {

/// What O_DIRECT wants of offset, length and address. File systems that ask for less are asked for no more.
inline constexpr std::uint64_t kDirectAlign = 4096;

inline constexpr int kUnregistered = -1;
/// Not to be registered any more: the file is about to go.
inline constexpr int kForgotten = -2;

/// What transfers go to: a file, or whatever else a queue knows. Each queue knows one kind, and is given no other.
class Target {
  public:
    Target() = default;
    Target(const Target&) = delete;
    Target& operator=(const Target&) = delete;
    virtual ~Target() = default;
    /// Whether transfers may go around the host's caches.
    virtual bool is_direct() const = 0;
    /// Whether this transfer may go around a cache that it could go through instead.
    virtual bool may_go_direct(std::uint64_t offset, const std::byte* data, std::uint64_t length) const = 0;
    /// Such a transfer was refused: from now on `may_go_direct` is false.
    virtual void give_up_direct() = 0;
};

/// Owns its descriptors. `descriptor` and `give_up_direct` are for any thread; `slots` belong to the queue's thread.
class File final : public Target {
  public:
    /// Duplicates `fd`, which stays the caller's. Throws std::system_error.
    explicit File(int fd);
    ~File() override;

    /// Whether reads and writes that are aligned go around the page cache.
    bool is_direct() const override { return direct_ok_.load(std::memory_order_relaxed); }
    /// The file system refused a direct transfer: all later ones go through the page cache.
    void give_up_direct() override { direct_ok_.store(false, std::memory_order_relaxed); }
    /// Whether this transfer may go around the page cache.
    bool may_go_direct(std::uint64_t offset, const std::byte* data, std::uint64_t length) const override;
    int descriptor(bool direct) const { return direct ? direct_fd_ : fd_; }

    /// Where a queue registered the descriptors ([0] buffered, [1] direct), or one of the two below.
    std::array<int, 2> slots{kUnregistered, kUnregistered};

  private:
    int fd_ = -1;
    int direct_fd_ = -1;
    std::atomic<bool> direct_ok_{false};
};

}  // namespace hcache::io
