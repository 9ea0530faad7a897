#include "slab.hpp"

#include <sys/mman.h>

#include <new>

namespace hcache::io {

Slab::Slab(std::size_t num_bytes) : num_bytes_(num_bytes) {
    if (num_bytes == 0) return;
    void* data = ::mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) throw std::bad_alloc();
    ::madvise(data, num_bytes, MADV_HUGEPAGE);  // a wish
    data_ = static_cast<std::byte*>(data);
}

Slab::~Slab() {
    if (data_ != nullptr) ::munmap(data_, num_bytes_);
}

}  // namespace hcache::io
