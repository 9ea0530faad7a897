// A libcuda.so.1 for tests: as much of the CUDA driver as csrc/gpu uses, on a machine without a GPU.
//
// "Device memory" is a stretch of addresses that nobody may touch (a CPU that does dies by SIGSEGV); its bytes lie in a
// shadow behind it that only the fakes know. Kernels run as the same source on the CPU (fake_kernels.hpp). What would
// be undefined with a real driver (a call without a context, memory that was freed) aborts or is an error here.
//
//   fake_cuda_set(name, value)   gpus, init_error, launch_error, copy_error, allocate_error, batch_error,
//   register_error;
//                                driver_version; delayed: what is queued on a stream waits there; sees_host: kernels
//                                may touch the host's memory, as they may on some machines
//   fake_cuda_get(name)          contexts, allocations, modules, streams, pinned: how many there are; launches, copies,
//                                batches: how many were; largest_batch
//   fake_cuda_new_stream()       a stream as another library would make it
//   fake_cuda_run(stream, most)  what is queued there runs, in order; returns how much
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "fake_copies.hpp"
#include "fake_kernels.hpp"
#include "fake_state.hpp"

using namespace fake;

extern "C" {

void fake_cuda_set(const char* name, long value) {
    const std::scoped_lock guard(state().lock);
    state().settings[name] = value;
}

long fake_cuda_get(const char* name) {
    const std::scoped_lock guard(state().lock);
    return state().counts[name];
}

void* fake_cuda_context() {
    return current_context;
}

/// 1 when the address is device memory, live or not.
int fake_cuda_is_device(std::uint64_t address) {
    const std::scoped_lock guard(state().lock);
    const auto start = reinterpret_cast<std::uint64_t>(base());
    return address >= start && address < start + kSpan;
}

/// `shadow_of`, for the other fakes.
void* fake_cuda_shadow(std::uint64_t address, std::uint64_t num_bytes) {
    return shadow_of(address, num_bytes);
}

void* fake_cuda_new_stream() {
    const std::scoped_lock guard(state().lock);
    void* const stream = ::operator new(1);
    state().streams[stream];
    ++state().counts["streams"];
    return stream;
}

int fake_cuda_run(void* stream, int most) {
    int num_run = 0;
    for (; most < 0 || num_run < most; ++num_run) {
        std::function<void()> work;
        {
            const std::scoped_lock guard(state().lock);
            Queue& queue = state().streams.at(stream);
            if (queue.empty()) break;
            work = std::move(queue.front());
            queue.pop_front();
        }
        work();
    }
    return num_run;
}

int cuInit(unsigned) {
    const long error = setting("init_error");
    if (error == 0) state().ready = true;
    return static_cast<int>(error);
}

int cuGetErrorName(int error, const char** name) {
    *name = error == kOutOfMemory ? "CUDA_ERROR_OUT_OF_MEMORY" : error == 100 ? "CUDA_ERROR_NO_DEVICE" : "CUDA_ERROR";
    return 0;
}

int cuDeviceGetCount(int* num) {
    *num = static_cast<int>(setting("gpus"));
    return state().ready ? 0 : kNotInitialized;
}

int cuDeviceGet(int* device, int ordinal) {
    *device = ordinal;
    return ordinal >= 0 && ordinal < setting("gpus") ? 0 : 101;
}

int cuDeviceGetName(char* name, int num_bytes, int) {
    std::snprintf(name, static_cast<std::size_t>(num_bytes), "Fake GPU");
    return 0;
}

int cuDevicePrimaryCtxRetain(void** context, int) {
    count("contexts", 1);
    *context = &the_context;
    return 0;
}

int cuDevicePrimaryCtxRelease_v2(int) {
    count("contexts", -1);
    return 0;
}

int cuCtxSetCurrent(void* context) {
    current_context = context;
    return 0;
}

int cuCtxPushCurrent_v2(void* context) {
    if (num_pushed == 8) misuse("contexts are pushed and not popped");
    pushed[num_pushed++] = current_context;
    current_context = context;
    return 0;
}

int cuCtxPopCurrent_v2(void** context) {
    if (num_pushed == 0) misuse("a context is popped that was not pushed");
    *context = current_context;
    current_context = pushed[--num_pushed];
    return 0;
}

int cuMemAlloc_v2(std::uint64_t* address, std::size_t num_bytes) {
    if (current_context == nullptr) return kInvalidContext;
    if (setting("allocate_error") != 0) return kOutOfMemory;
    const std::scoped_lock guard(state().lock);
    const std::uint64_t start = state().next;
    const std::uint64_t whole = (num_bytes + kPage - 1) / kPage * kPage;
    if (num_bytes == 0 || start + whole + kPage > kSpan) return kOutOfMemory;
    state().next += whole + kPage;  // never used again: what is freed stays an error
    ::mprotect(base() + kSpan + start, whole, PROT_READ | PROT_WRITE);
    std::memset(base() + kSpan + start, 0xA5, whole);
    *address = reinterpret_cast<std::uint64_t>(base()) + start;
    state().allocations[*address] = num_bytes;
    ++state().counts["allocations"];
    return 0;
}

int cuMemFree_v2(std::uint64_t address) {
    if (current_context == nullptr) return kInvalidContext;
    const std::scoped_lock guard(state().lock);
    for (const auto& [stream, queue] : state().streams) {
        if (!queue.empty()) misuse("memory is freed while work is queued (the driver would wait for it)");
    }
    if (state().allocations.erase(address) == 0) misuse("memory is freed that is none");
    --state().counts["allocations"];
    return 0;
}

int cuMemHostRegister_v2(void* memory, std::size_t num_bytes, unsigned flags) {
    if (current_context == nullptr) return kInvalidContext;
    if (setting("register_error") != 0) return static_cast<int>(setting("register_error"));
    if (memory == nullptr || num_bytes == 0 || flags != 1) return kInvalidValue;
    const std::scoped_lock guard(state().lock);
    const auto start = reinterpret_cast<std::uint64_t>(memory);
    const auto next = state().pinned.lower_bound(start);
    if (region_of(state().pinned, start) != nullptr) return kAlreadyPinned;
    if (next != state().pinned.end() && next->first < start + num_bytes) return kAlreadyPinned;
    state().pinned[start] = num_bytes;
    ++state().counts["pinned"];
    return 0;
}

int cuMemHostUnregister(void* memory) {
    if (current_context == nullptr) return kInvalidContext;
    const std::scoped_lock guard(state().lock);
    if (state().pinned.erase(reinterpret_cast<std::uint64_t>(memory)) == 0) return kNotPinned;
    --state().counts["pinned"];
    return 0;
}

int cuMemcpyHtoDAsync_v2(std::uint64_t to, const void* from, std::size_t num_bytes, void* stream) {
    if (current_context == nullptr || !is_stream(stream)) return kInvalidContext;
    if (setting("copy_error") != 0) return static_cast<int>(setting("copy_error"));
    auto work = copy_of(to, reinterpret_cast<std::uint64_t>(from), num_bytes);
    if (!work) return kInvalidValue;
    count("copies", 1);
    enqueue(stream, std::move(work));
    return 0;
}

int cuMemcpyDtoHAsync_v2(void* to, std::uint64_t from, std::size_t num_bytes, void* stream) {
    if (current_context == nullptr || !is_stream(stream)) return kInvalidContext;
    void* const shadow = fake_cuda_shadow(from, num_bytes);
    if (shadow == nullptr) return kInvalidValue;
    enqueue(stream, [=] { std::memcpy(to, shadow, num_bytes); });
    return 0;
}

int cuMemcpyBatchAsync() {
    misuse("cuMemcpyBatchAsync is bound by its name: which signature has it?");
}

int cuDriverGetVersion(int* version) {
    *version = static_cast<int>(setting("driver_version"));
    return 0;
}

int cuStreamCreate(void** stream, unsigned) {
    if (current_context == nullptr) return kInvalidContext;
    *stream = fake_cuda_new_stream();
    return 0;
}

int cuStreamDestroy_v2(void* stream) {
    if (!is_stream(stream) || is_default(stream)) misuse("a stream is destroyed that is none");
    fake_cuda_run(stream, -1);
    const std::scoped_lock guard(state().lock);
    state().streams.erase(stream);
    ::operator delete(stream);
    --state().counts["streams"];
    return 0;
}

int cuStreamSynchronize(void* stream) {
    if (current_context == nullptr || !is_stream(stream)) return kInvalidContext;
    if (!is_default(stream)) fake_cuda_run(stream, -1);
    return 0;
}

int cuModuleLoadData(void** module, const void* image) {
    if (current_context == nullptr) return kInvalidContext;
    std::uint32_t magic;
    std::memcpy(&magic, image, sizeof magic);
    if (magic != kFatBinary) return kInvalidImage;
    count("modules", 1);
    *module = &the_module;
    return 0;
}

int cuModuleUnload(void* module) {
    if (module != &the_module) misuse("a module is unloaded that is none");
    count("modules", -1);
    return 0;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
    if (current_context == nullptr || module != &the_module) return kInvalidContext;
    count("lookups", 1);
    for (const auto& entry : fake::kKernels) {
        if (std::strcmp(name, entry.name) != 0) continue;
        *function = const_cast<void*>(static_cast<const void*>(&entry));
        return 0;
    }
    return kNotFound;
}

int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared_bytes, void* stream, void** arguments, void**) {
    if (current_context == nullptr || !is_stream(stream)) return kInvalidContext;
    if (setting("launch_error") != 0) return static_cast<int>(setting("launch_error"));
    if (grid_x == 0 || grid_y == 0 || grid_y > 65535 || grid_z != 1 || block_x == 0 || block_x > 1024 || block_y != 1 ||
        block_z != 1 || shared_bytes != 0) {
        return kInvalidValue;
    }
    for (const auto& entry : fake::kKernels) {
        if (function != &entry) continue;
        count("launches", 1);
        enqueue(stream, entry.kernel({grid_x, grid_y, block_x, arguments}));
        return 0;
    }
    misuse("a function is launched that is none");
}

int cuGetProcAddress_v2(const char* symbol, void** found, int version, std::uint64_t flags, int* status) {
    *found = nullptr;
    *status = 0;
    if (flags != 1) misuse("functions are wanted as the legacy default stream has them");
    if (version > setting("driver_version")) return kInvalidValue;
    if (std::strcmp(symbol, "cuMemcpyBatchAsync") != 0) {
        *status = 1;
    } else if (version < 12080) {
        *status = 2;
    } else {
        *found = version < 13000 ? reinterpret_cast<void*>(batch_12) : reinterpret_cast<void*>(batch_13);
    }
    return 0;
}

}  // extern "C"

namespace fake {

void* reach(std::uint64_t address, std::uint64_t num_bytes) {
    if (fake_cuda_is_device(address) == 0) {
        if (setting("sees_host") == 0) misuse("a kernel touches the host's memory");
        return reinterpret_cast<void*>(address);
    }
    void* const shadow = shadow_of(address, num_bytes);
    if (shadow == nullptr) misuse("a kernel touches device memory that is not allocated");
    return shadow;
}

}  // namespace fake
