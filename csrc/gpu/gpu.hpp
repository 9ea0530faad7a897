// One GPU: its memory, pinned memory of the host, and the context that everything else here works in.
#pragma once

#include <cstddef>
#include <span>
#include <string>

#include "driver.hpp"

namespace hcache::gpu {

/// The primary context of one GPU, which is the one that frameworks use, and a stream of our own. Any thread; no method
/// leaves the calling thread with another current context than before, but `enter`. Errors are std::runtime_error.
class Gpu {
  public:
    /// The GPU is the calling thread's while this lives.
    class Current {
      public:
        explicit Current(const Gpu& gpu);
        ~Current();
        Current(const Current&) = delete;
        Current& operator=(const Current&) = delete;

      private:
        const Driver& driver_;
    };

    explicit Gpu(int idx);
    ~Gpu();
    Gpu(const Gpu&) = delete;
    Gpu& operator=(const Gpu&) = delete;

    const Driver& driver() const { return driver_; }
    const std::string& name() const { return name_; }
    /// Ours; it does not wait for the default stream, nor that one for it.
    Handle stream() const { return stream_; }
    /// Make this GPU the calling thread's for good: for threads of our own.
    void enter() const;
    /// Device memory, page-aligned in practice (the driver promises 256 bytes).
    Address allocate(std::size_t num_bytes);
    /// Also ends what is still running on the GPU.
    void free(Address address);
    /// Have whole pages of the host's memory stay where they are, and every GPU copy from them by itself. Whoever owns
    /// them unpins them before they go, by the address that they were pinned by.
    void pin(void* memory, std::size_t num_bytes);
    void unpin(void* memory);
    /// Host to device. The bytes are there when this returns, for kernels on every stream.
    void copy_in(Address to, std::span<const std::byte> from);
    /// Device to host, after what was written there before the call.
    void copy_out(std::span<std::byte> to, Address from);

  private:
    const Driver& driver_;
    int device_ = 0;
    std::string name_;
    Handle context_ = nullptr;
    Handle stream_ = nullptr;
};

}  // namespace hcache::gpu
