// A libcuda.so.1 for tests: as much of the CUDA driver as csrc/gpu uses, on a machine without a GPU.
//
// "Device memory" is a stretch of addresses that nobody may touch (a CPU that does dies by SIGSEGV); its bytes lie in a
// shadow behind it that only the fakes know. The checksum kernel runs as the same source on the CPU. What would be
// undefined with a real driver (a call without a context, memory that was freed) aborts or is an error here.
//
//   fake_cuda_set(name, value)   gpus, init_error, launch_error, copy_error, allocate_error
//   fake_cuda_get(name)          contexts, allocations, modules, streams: how many there are; launches: how many were
#include <sys/mman.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "../../../csrc/gpu/crc32c.cuh"

using namespace hcache::gpu;

namespace {

constexpr int kOutOfMemory = 2, kNotInitialized = 3, kInvalidImage = 200, kInvalidContext = 201, kInvalidValue = 1;
constexpr std::uint64_t kSpan = std::uint64_t{1} << 30;
constexpr std::uint64_t kPage = 4096;
constexpr std::uint32_t kFatBinary = 0xBA55ED50;

struct State {
    std::mutex lock;
    std::map<std::string, long> settings{{"gpus", 1}};
    std::map<std::string, long> counts;
    std::map<std::uint64_t, std::uint64_t> allocations;
    std::uint64_t next = kPage;
    bool ready = false;
    char* base = nullptr;
};

State& state() {
    static State& one = *new State;
    return one;
}

thread_local void* current_context = nullptr;
thread_local void* pushed[8];
thread_local unsigned num_pushed = 0;
int the_context, the_stream, the_module, the_function;

long setting(const char* name) {
    const std::scoped_lock guard(state().lock);
    return state().settings[name];
}

void count(const char* name, long change) {
    const std::scoped_lock guard(state().lock);
    state().counts[name] += change;
}

char* base() {  // with the lock held
    if (state().base == nullptr) {
        void* const found = ::mmap(nullptr, 2 * kSpan, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (found == MAP_FAILED) std::abort();
        state().base = static_cast<char*>(found);
    }
    return state().base;
}

[[noreturn]] void misuse(const char* what) {
    std::fprintf(stderr, "fake libcuda: %s\n", what);
    std::abort();
}

}  // namespace

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

/// Where the bytes of a piece of device memory really are; null unless it is within one allocation.
void* fake_cuda_shadow(std::uint64_t address, std::uint64_t num_bytes) {
    const std::scoped_lock guard(state().lock);
    auto after = state().allocations.upper_bound(address);
    if (after == state().allocations.begin()) return nullptr;
    --after;
    if (address + num_bytes > after->first + after->second) return nullptr;
    return reinterpret_cast<void*>(address + kSpan);
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
    if (state().allocations.erase(address) == 0) misuse("memory is freed that is none");
    --state().counts["allocations"];
    return 0;
}

int cuMemcpyHtoDAsync_v2(std::uint64_t to, const void* from, std::size_t num_bytes, void* stream) {
    if (current_context == nullptr || stream != &the_stream) return kInvalidContext;
    if (setting("copy_error") != 0) return static_cast<int>(setting("copy_error"));
    void* const shadow = fake_cuda_shadow(to, num_bytes);
    if (shadow == nullptr) return kInvalidValue;
    std::memcpy(shadow, from, num_bytes);
    return 0;
}

int cuMemcpyDtoHAsync_v2(void* to, std::uint64_t from, std::size_t num_bytes, void* stream) {
    if (current_context == nullptr || stream != &the_stream) return kInvalidContext;
    void* const shadow = fake_cuda_shadow(from, num_bytes);
    if (shadow == nullptr) return kInvalidValue;
    std::memcpy(to, shadow, num_bytes);
    return 0;
}

int cuStreamCreate(void** stream, unsigned) {
    if (current_context == nullptr) return kInvalidContext;
    count("streams", 1);
    *stream = &the_stream;
    return 0;
}

int cuStreamDestroy_v2(void* stream) {
    if (stream != &the_stream) misuse("a stream is destroyed that is none");
    count("streams", -1);
    return 0;
}

int cuStreamSynchronize(void*) {
    return current_context == nullptr ? kInvalidContext : 0;
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

int cuModuleGetFunction(void** function, void*, const char* name) {
    *function = &the_function;
    return std::strcmp(name, kKernelName) == 0 ? 0 : 500;
}

int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned, unsigned block_x, unsigned, unsigned,
                   unsigned, void* stream, void** parameters, void**) {
    if (current_context == nullptr || function != &the_function || stream != &the_stream) return kInvalidContext;
    if (setting("launch_error") != 0) return static_cast<int>(setting("launch_error"));
    count("launches", 1);
    static const auto* const tables = [] {
        auto* const made = new std::uint32_t[kNumTables][kNumEntries];
        for (unsigned idx = 0; idx < kNumTables; ++idx) {
            for (unsigned byte = 0; byte < kNumEntries; ++byte) made[idx][byte] = table_entry(idx, byte);
        }
        return made;
    }();
    std::uint64_t address;
    std::memcpy(&address, parameters[0], sizeof address);
    const auto& powers = *static_cast<const Powers*>(parameters[1]);
    auto* const pieces = static_cast<Piece*>(fake_cuda_shadow(address, grid_y * sizeof(Piece)));
    if (pieces == nullptr || block_x % 32 != 0) return kInvalidValue;
    for (unsigned y = 0; y < grid_y; ++y) {
        Piece& piece = pieces[y];
        if (piece.num_bytes == 0) continue;
        const void* const bytes = fake_cuda_shadow(piece.address, piece.num_bytes);
        if (bytes == nullptr) return 700;
        for (std::uint64_t slice = 0; slice < std::uint64_t{grid_x} * block_x; ++slice) {
            if (slice >= num_slices(piece.num_bytes)) break;
            piece.crc ^= share_of(tables, powers, static_cast<const unsigned char*>(bytes), piece.num_bytes, slice);
        }
    }
    return 0;
}

}  // extern "C"
