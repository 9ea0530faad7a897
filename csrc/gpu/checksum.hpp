// CRC32Cs of device memory, computed there.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <span>

#include "crc32c.cuh"
#include "kernels.hpp"

namespace hcache::gpu {

/// crc32c.cuh on a GPU. Any thread; calls take turns.
class Checksum {
  public:
    /// Most pieces of one launch; longer lists take several.
    static constexpr std::size_t kMaxPieces = 256;

    /// `image`: the compiled kernels. Throws std::runtime_error, also when it has no code for this GPU.
    Checksum(std::shared_ptr<Gpu> gpu, std::span<const std::byte> image);
    ~Checksum();
    Checksum(const Checksum&) = delete;
    Checksum& operator=(const Checksum&) = delete;

    /// Fill in each piece's `crc`. Sees what was written to the memory before the call; blocks until done.
    void run(std::span<Piece> pieces);

  private:
    void launch(std::span<Piece> pieces);

    const Powers powers_ = make_powers();
    Kernels kernels_;
    std::mutex turns_;
    Address buffer_ = 0;
};

}  // namespace hcache::gpu
