#include "gpu.hpp"

#include <algorithm>
#include <stdexcept>

#include "library.hpp"

namespace hcache::gpu {
namespace {

constexpr unsigned kNonBlocking = 1;  // CU_STREAM_NON_BLOCKING: no turns with the default stream

Driver load() {
    const Library library("libcuda.so.1", "MII_HCACHE_CUDA_LIB");
    Driver driver{};
    library.find(driver.init, "cuInit");
    library.find(driver.device_count, "cuDeviceGetCount");
    library.find(driver.device_get, "cuDeviceGet");
    library.find(driver.device_name, "cuDeviceGetName");
    library.find(driver.context_retain, "cuDevicePrimaryCtxRetain");
    library.find(driver.context_release, "cuDevicePrimaryCtxRelease_v2");
    library.find(driver.context_set, "cuCtxSetCurrent");
    library.find(driver.context_push, "cuCtxPushCurrent_v2");
    library.find(driver.context_pop, "cuCtxPopCurrent_v2");
    library.find(driver.allocate, "cuMemAlloc_v2");
    library.find(driver.free, "cuMemFree_v2");
    library.find(driver.copy_in, "cuMemcpyHtoDAsync_v2");
    library.find(driver.copy_out, "cuMemcpyDtoHAsync_v2");
    library.find(driver.stream_create, "cuStreamCreate");
    library.find(driver.stream_destroy, "cuStreamDestroy_v2");
    library.find(driver.stream_synchronize, "cuStreamSynchronize");
    library.find(driver.module_load, "cuModuleLoadData");
    library.find(driver.module_unload, "cuModuleUnload");
    library.find(driver.module_function, "cuModuleGetFunction");
    library.find(driver.launch, "cuLaunchKernel");
    library.find(driver.error_name, "cuGetErrorName");
    driver.check(driver.init(0), "cuInit");
    return driver;
}

}  // namespace

const Driver& Driver::get() {
    static const Driver driver = load();  // one that throws is tried again by the next call
    return driver;
}

void Driver::check(Result result, const char* what) const {
    if (result == kSuccess) return;
    const char* name = nullptr;
    if (error_name(result, &name) != kSuccess || name == nullptr) name = "unknown error";
    throw std::runtime_error(std::string(what) + " failed: " + name + " (" + std::to_string(result) + ")");
}

int num_gpus() {
    const Driver& driver = Driver::get();
    int count = 0;
    driver.check(driver.device_count(&count), "cuDeviceGetCount");
    return count;
}

/// The GPU is the calling thread's while this lives.
class Gpu::Current {
  public:
    explicit Current(const Gpu& gpu) : driver_(gpu.driver_) {
        driver_.check(driver_.context_push(gpu.context_), "cuCtxPushCurrent");
    }
    ~Current() {
        Handle before;
        driver_.context_pop(&before);
    }
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;

  private:
    const Driver& driver_;
};

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

Checksum::Checksum(std::shared_ptr<Gpu> gpu, std::span<const std::byte> image)
    : gpu_(std::move(gpu)), image_(image.begin(), image.end()) {
    const Driver& driver = gpu_->driver_;
    const Gpu::Current current(*gpu_);
    driver.check(driver.module_load(&module_, image_.data()), "loading the checksum kernel");
    try {
        driver.check(driver.module_function(&function_, module_, kKernelName), "cuModuleGetFunction");
        buffer_ = gpu_->allocate(kMaxPieces * sizeof(Piece));
    } catch (...) {
        driver.module_unload(module_);
        throw;
    }
}

Checksum::~Checksum() {
    const Driver& driver = gpu_->driver_;
    if (driver.context_push(gpu_->context_) != kSuccess) return;
    driver.free(buffer_);
    driver.module_unload(module_);
    Handle before;
    driver.context_pop(&before);
}

void Checksum::run(std::span<Piece> pieces) {
    const std::scoped_lock guard(turns_);
    const Gpu::Current current(*gpu_);
    for (; !pieces.empty(); pieces = pieces.subspan(std::min(pieces.size(), kMaxPieces))) {
        launch(pieces.first(std::min(pieces.size(), kMaxPieces)));
    }
}

void Checksum::launch(std::span<Piece> pieces) {
    const Driver& driver = gpu_->driver_;
    std::uint64_t most_slices = 1;
    for (Piece& piece : pieces) {
        piece.crc = crc_of_zeros(powers_, piece.num_bytes);
        most_slices = std::max(most_slices, num_slices(piece.num_bytes));
    }
    const std::span<std::byte> bytes = std::as_writable_bytes(pieces);
    gpu_->copy_in(buffer_, bytes);
    const auto num_blocks = static_cast<unsigned>((most_slices + kThreadsPerBlock - 1) / kThreadsPerBlock);
    Powers powers = powers_;
    void* parameters[] = {&buffer_, &powers};
    driver.check(driver.launch(function_, num_blocks, static_cast<unsigned>(pieces.size()), 1, kThreadsPerBlock, 1, 1,
                               0, gpu_->stream_, parameters, nullptr),
                 "cuLaunchKernel");
    gpu_->copy_out(bytes, buffer_);
}

}  // namespace hcache::gpu
