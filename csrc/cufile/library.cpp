#include "library.hpp"

#include <cerrno>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>

#include "../gpu/gpu.hpp"
#include "../gpu/library.hpp"

namespace hcache::cufile {
namespace {

constexpr unsigned kAllowsCompatMode = 1U << 1;  // of Properties::nvfs.control_flags
constexpr unsigned kPciP2pdma = 1U << 11;        // of Properties::nvfs.status_flags

std::string words_for(const Status& status) {
    switch (status.error) {
        case kNotInitialized:
            return "the nvidia-fs driver is not loaded and cufile.json forbids the compatibility mode";
        case kPlatformNotSupported:
            return "GPUDirect Storage does not support this platform";
        case kDeviceNotSupported:
            return "GPUDirect Storage does not support this GPU";
        case kPermissionDenied:
            return "permission denied";
        case kCudaDriverError:
            return "CUDA error " + std::to_string(status.cuda_error);
        default:
            return "cuFile error " + std::to_string(status.error);
    }
}

Library load() {
    const gpu::Library found("libcufile.so.0", "MII_HCACHE_CUFILE_LIB");
    Library library{};
    found.find(library.driver_open, "cuFileDriverOpen");
    found.find(library.properties, "cuFileDriverGetProperties");
    found.find(library.handle_register, "cuFileHandleRegister");
    found.find(library.handle_deregister, "cuFileHandleDeregister");
    found.find(library.buffer_register, "cuFileBufRegister");
    found.find(library.buffer_deregister, "cuFileBufDeregister");
    found.find(library.read, "cuFileRead");
    found.find(library.write, "cuFileWrite");
    return library;
}

/// A call of cuFileDriverOpen, on a thread of its own: it cannot be told to stop, only be left alone.
struct Opening {
    explicit Opening(const Library& wanted) : library(wanted) {}
    const Library library;
    std::mutex lock;
    std::condition_variable done;
    std::optional<Status> status;
};

std::shared_ptr<Opening> begin_to_open() {
    auto opening = std::make_shared<Opening>(load());
    std::thread([opening] {
        const Status status = opening->library.driver_open();
        const std::scoped_lock guard(opening->lock);
        opening->status = status;
        opening->done.notify_all();
    }).detach();
    return opening;
}

}  // namespace

const Library& Library::get(std::chrono::milliseconds patience) {
    static std::mutex turns;
    static std::shared_ptr<Opening> opening;  // in progress, or done well
    const std::scoped_lock turn(turns);
    if (!opening) opening = begin_to_open();
    std::unique_lock guard(opening->lock);
    if (!opening->done.wait_for(guard, patience, [] { return opening->status.has_value(); })) {
        throw std::runtime_error("cuFileDriverOpen does not come back");
    }
    const Status status = *opening->status;
    guard.unlock();
    if (status.error != 0 && status.error != kAlreadyOpen) {
        opening.reset();  // to be tried again by the next call
        throw std::runtime_error("cuFileDriverOpen failed: " + words_for(status));
    }
    return opening->library;
}

int errno_of(int cufile_error) {
    switch (cufile_error) {
        case kInvalidOpenFlag:
        case kDirectNotSet:
            return EINVAL;
        case kIoNotSupported:
        case kIoDisabled:
        case kPlatformNotSupported:
        case kDeviceNotSupported:
            return EOPNOTSUPP;
        case kPointerInvalid:
        case kMemoryTypeInvalid:
        case kPointerRange:
        case kMemoryNotRegistered:
            return EFAULT;
        case kPermissionDenied:
            return EACCES;
        case kPinningFailed:
        case kNoMemory:
            return ENOMEM;
        default:
            return EIO;
    }
}

std::optional<std::string> why_no_cufile(std::chrono::milliseconds patience) {
    try {
        if (gpu::num_gpus() == 0) return "there is no GPU";
    } catch (const std::runtime_error& error) {
        return std::string("no GPU can be used (") + error.what() + ")";
    }
    try {
        Library::get(patience);
    } catch (const std::runtime_error& error) {
        return std::string("cuFile cannot be used (") + error.what() + ")";
    }
    return std::nullopt;
}

std::string how_cufile_moves_bytes() {
    Properties properties{};
    const Status status = Library::get().properties(&properties);
    if (status.error != 0) return "in a way that cuFile does not tell (" + words_for(status) + ")";
    const auto& nvfs = properties.nvfs;
    if (nvfs.major_version != 0) {
        return "nvidia-fs " + std::to_string(nvfs.major_version) + "." + std::to_string(nvfs.minor_version) +
               ": from the SSD to the GPU where the file system allows";
    }
    if ((nvfs.status_flags & kPciP2pdma) != 0) return "PCI P2PDMA: from the SSD to the GPU where the kernel allows";
    const std::string reason = "compatibility mode, there is no nvidia-fs driver: through host memory";
    return (nvfs.control_flags & kAllowsCompatMode) != 0 ? reason : reason + ", and cufile.json forbids that";
}

}  // namespace hcache::cufile
