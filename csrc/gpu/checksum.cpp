#include "checksum.hpp"

#include <algorithm>

namespace hcache::gpu {

Checksum::Checksum(std::shared_ptr<Gpu> gpu, std::span<const std::byte> image) : kernels_(std::move(gpu), image) {
    kernels_.function(kKernelName);
    buffer_ = kernels_.gpu()->allocate(kMaxPieces * sizeof(Piece));
}

Checksum::~Checksum() {
    try {
        kernels_.gpu()->free(buffer_);
    } catch (const std::exception&) {
        // A driver that shuts down refuses.
    }
}

void Checksum::run(std::span<Piece> pieces) {
    const std::scoped_lock guard(turns_);
    for (; !pieces.empty(); pieces = pieces.subspan(std::min(pieces.size(), kMaxPieces))) {
        launch(pieces.first(std::min(pieces.size(), kMaxPieces)));
    }
}

void Checksum::launch(std::span<Piece> pieces) {
    Gpu& gpu = *kernels_.gpu();
    std::uint64_t most_slices = 1;
    for (Piece& piece : pieces) {
        piece.crc = crc_of_zeros(powers_, piece.num_bytes);
        most_slices = std::max(most_slices, num_slices(piece.num_bytes));
    }
    const std::span<std::byte> bytes = std::as_writable_bytes(pieces);
    gpu.copy_in(buffer_, bytes);
    const auto num_blocks = static_cast<unsigned>((most_slices + kThreadsPerBlock - 1) / kThreadsPerBlock);
    Powers powers = powers_;
    void* arguments[] = {&buffer_, &powers};
    kernels_.launch(kKernelName, num_blocks, static_cast<unsigned>(pieces.size()), kThreadsPerBlock, arguments,
                    gpu.stream());
    gpu.copy_out(bytes, buffer_);
}

}  // namespace hcache::gpu
