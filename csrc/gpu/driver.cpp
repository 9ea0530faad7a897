#include "driver.hpp"

#include <stdexcept>
#include <string>

#include "library.hpp"

namespace hcache::gpu {
namespace {

Driver load() {
    const Library library("libcuda.so.1", "MII_HCACHE_CUDA_LIB");
    Driver driver{};
    library.find(driver.init, "cuInit");
    library.find(driver.version, "cuDriverGetVersion");
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
    library.find(driver.host_register, "cuMemHostRegister_v2");
    library.find(driver.host_unregister, "cuMemHostUnregister");
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
    library.find_if_there(driver.address_of, "cuGetProcAddress_v2");
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

void* Driver::find(const char* symbol, int wanted) const {
    constexpr std::uint64_t kLegacyStream = 1;  // CU_GET_PROC_ADDRESS_LEGACY_STREAM: as functions found by name
    int own = 0, status = 0;
    void* found = nullptr;
    // A driver that is older than `wanted` calls it an error; some give the function as they know it.
    if (address_of == nullptr || version(&own) != kSuccess || own < wanted) return nullptr;
    if (address_of(symbol, &found, wanted, kLegacyStream, &status) != kSuccess || status != 0) return nullptr;
    return found;
}

int num_gpus() {
    const Driver& driver = Driver::get();
    int count = 0;
    driver.check(driver.device_count(&count), "cuDeviceGetCount");
    return count;
}

}  // namespace hcache::gpu
