// Memory that a device may read and write by itself.
#pragma once

#include <cstddef>
#include <memory>
#include <span>

#include "ops.hpp"

namespace hcache::spdk {

inline constexpr std::size_t kPageBytes = 4096;

/// SPDK's own memory. Aligned to 4 KiB.
class DmaBuffer {
  public:
    /// Throws std::bad_alloc.
    DmaBuffer(const Ops& ops, std::size_t num_bytes);
    ~DmaBuffer();
    DmaBuffer(const DmaBuffer&) = delete;
    DmaBuffer& operator=(const DmaBuffer&) = delete;
    std::byte* data() const { return data_; }

  private:
    const Ops& ops_;
    std::byte* data_;
};

/// Somebody else's memory, made known to SPDK for as long as this lives. The memory has to live longer.
///
/// Whole pages of 4 KiB; SPDK before 25.09 takes only whole 2 MiB, so the span may lose both its ends. SPDK accepts
/// memory that the device cannot reach and fails the transfers later: so every page is asked for, and one without an
/// address fails the whole.
class Registration {
  public:
    /// Throws std::runtime_error with the reason.
    Registration(const Ops& ops, std::span<std::byte> memory);
    ~Registration();
    Registration(const Registration&) = delete;
    Registration& operator=(const Registration&) = delete;
    /// What can be used.
    std::span<std::byte> bytes() const { return bytes_; }

  private:
    const Ops& ops_;
    std::span<std::byte> bytes_;
};

}  // namespace hcache::spdk
