#include "gpu.hpp"

namespace hcache::gpu {
namespace {

constexpr unsigned kNonBlocking = 1;  // CU_STREAM_NON_BLOCKING: no turns with the default stream
constexpr unsigned kPortable = 1;     // CU_MEMHOSTREGISTER_PORTABLE: pinned for every GPU

}  // namespace

Gpu::Current::Current(const Gpu& gpu) : driver_(gpu.driver_) {
    driver_.check(driver_.context_push(gpu.context_), "cuCtxPushCurrent");
}

Gpu::Current::~Current() {
    Handle before;
    driver_.context_pop(&before);
}

Gpu::Gpu(int idx) : driver_(Driver::get()) {
    driver_.check(driver_.device_get(&device_, idx), "cuDeviceGet");
    char name[128] = {};
    driver_.check(driver_.device_name(name, sizeof name - 1, device_), "cuDeviceGetName");
    name_ = name;
    driver_.check(driver_.context_retain(&context_, device_), "cuDevicePrimaryCtxRetain");
    try {
        const Current current(*this);
        driver_.check(driver_.stream_create(&stream_, kNonBlocking), "cuStreamCreate");
    } catch (...) {
        driver_.context_release(device_);
        throw;
    }
}

Gpu::~Gpu() {
    // A driver that shuts down (the process ends) refuses all this; there is nothing left to mend then.
    if (driver_.context_push(context_) == kSuccess) {
        driver_.stream_destroy(stream_);
        Handle before;
        driver_.context_pop(&before);
    }
    driver_.context_release(device_);
}

void Gpu::enter() const {
    driver_.check(driver_.context_set(context_), "cuCtxSetCurrent");
}

Address Gpu::allocate(std::size_t num_bytes) {
    const Current current(*this);
    Address address = 0;
    driver_.check(driver_.allocate(&address, num_bytes), "cuMemAlloc");
    return address;
}

void Gpu::free(Address address) {
    const Current current(*this);
    driver_.check(driver_.free(address), "cuMemFree");
}

void Gpu::pin(void* memory, std::size_t num_bytes) {
    const Current current(*this);
    driver_.check(driver_.host_register(memory, num_bytes, kPortable), "cuMemHostRegister");
}

void Gpu::unpin(void* memory) {
    const Current current(*this);
    driver_.check(driver_.host_unregister(memory), "cuMemHostUnregister");
}

// On a stream and waited for: the plain call returns once pageable bytes are staged, before they have arrived.
void Gpu::copy_in(Address to, std::span<const std::byte> from) {
    const Current current(*this);
    driver_.check(driver_.copy_in(to, from.data(), from.size(), stream_), "cuMemcpyHtoD");
    driver_.check(driver_.stream_synchronize(stream_), "cuStreamSynchronize");
}

void Gpu::copy_out(std::span<std::byte> to, Address from) {
    const Current current(*this);
    driver_.check(driver_.copy_out(to.data(), from, to.size(), stream_), "cuMemcpyDtoH");
    driver_.check(driver_.stream_synchronize(stream_), "cuStreamSynchronize");
}

}  // namespace hcache::gpu
