#include "memory.hpp"

#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

namespace hcache::spdk {
namespace {

constexpr std::size_t kHugePageBytes = std::size_t{2} << 20;

std::span<std::byte> trimmed(std::span<std::byte> memory, std::size_t align) {
    const auto start = reinterpret_cast<std::uintptr_t>(memory.data());
    const std::size_t skipped = (align - start % align) % align;
    if (skipped >= memory.size()) return {};
    return memory.subspan(skipped, (memory.size() - skipped) / align * align);
}

}  // namespace

DmaBuffer::DmaBuffer(const Ops& ops, std::size_t num_bytes)
    : ops_(ops), data_(static_cast<std::byte*>(ops.dma_alloc(num_bytes))) {
    if (data_ == nullptr) throw std::bad_alloc();
}

DmaBuffer::~DmaBuffer() {
    ops_.dma_free(data_);
}

Registration::Registration(const Ops& ops, std::span<std::byte> memory) : ops_(ops) {
    int error = 0;
    for (const std::size_t align : {kPageBytes, kHugePageBytes}) {
        bytes_ = trimmed(memory, align);
        if (bytes_.empty()) throw std::runtime_error("not one whole page lies in the memory");
        error = ops.register_memory(bytes_.data(), bytes_.size());
        if (error == 0) break;
    }
    if (error != 0) throw std::runtime_error(std::string("SPDK refuses the memory: ") + std::strerror(-error));
    for (std::size_t offset = 0; offset < bytes_.size(); offset += kPageBytes) {
        if (ops.translates(bytes_.data() + offset)) continue;
        ops.unregister_memory(bytes_.data(), bytes_.size());
        throw std::runtime_error("SPDK took the memory, but the device has no address for page " +
                                 std::to_string(offset / kPageBytes) + " of it (no IOMMU?)");
    }
}

Registration::~Registration() {
    ops_.unregister_memory(bytes_.data(), bytes_.size());
}

}  // namespace hcache::spdk
