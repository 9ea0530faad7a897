// Memory for state in DRAM: whole pages, huge ones where the kernel has them, so that O_DIRECT and copies like it.
#pragma once

#include <cstddef>
#include <span>

namespace hcache::io {

/// Zeroed memory that is page-aligned and given back at the end. Pages are made when they are first written.
class Slab {
  public:
    /// Throws std::bad_alloc.
    explicit Slab(std::size_t num_bytes);
    ~Slab();
    Slab(const Slab&) = delete;
    Slab& operator=(const Slab&) = delete;
    std::span<std::byte> bytes() const { return {data_, num_bytes_}; }

  private:
    std::byte* data_ = nullptr;
    std::size_t num_bytes_;
};

}  // namespace hcache::io
