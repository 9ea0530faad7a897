// What fake_cuda.cpp keeps: memory, streams and settings. One library, one state.
#pragma once

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <string>

namespace fake {

constexpr int kInvalidValue = 1, kOutOfMemory = 2, kNotInitialized = 3, kInvalidImage = 200, kInvalidContext = 201,
              kNotFound = 500, kAlreadyPinned = 712, kNotPinned = 713;
constexpr std::uint64_t kSpan = std::uint64_t{1} << 30;
constexpr std::uint64_t kPage = 4096;
constexpr std::uint32_t kFatBinary = 0xBA55ED50;

using Regions = std::map<std::uint64_t, std::uint64_t>;  // start, bytes
using Queue = std::deque<std::function<void()>>;

struct State {
    std::mutex lock;
    std::map<std::string, long> settings{{"gpus", 1}, {"driver_version", 13000}};
    std::map<std::string, long> counts;
    Regions allocations, pinned;
    std::map<void*, Queue> streams;
    std::uint64_t next = kPage;
    bool ready = false;
    char* base = nullptr;
};

inline State& state() {
    static State& one = *new State;
    return one;
}

inline thread_local void* current_context = nullptr;
inline thread_local void* pushed[8];
inline thread_local unsigned num_pushed = 0;
inline int the_context, the_module;

inline long setting(const char* name) {
    const std::scoped_lock guard(state().lock);
    return state().settings[name];
}

inline void count(const char* name, long change) {
    const std::scoped_lock guard(state().lock);
    state().counts[name] += change;
}

inline char* base() {  // with the lock held
    if (state().base == nullptr) {
        void* const found = ::mmap(nullptr, 2 * kSpan, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (found == MAP_FAILED) std::abort();
        state().base = static_cast<char*>(found);
    }
    return state().base;
}

/// The region that has this address; null when there is none. With the lock held.
inline const Regions::value_type* region_of(const Regions& regions, std::uint64_t address) {
    auto after = regions.upper_bound(address);
    if (after == regions.begin()) return nullptr;
    --after;
    return address < after->first + after->second ? &*after : nullptr;
}

inline bool is_default(void* stream) {  // null, CU_STREAM_LEGACY, CU_STREAM_PER_THREAD
    return reinterpret_cast<std::uintptr_t>(stream) <= 2;
}

inline bool is_stream(void* stream) {
    const std::scoped_lock guard(state().lock);
    return is_default(stream) || state().streams.contains(stream);
}

inline void enqueue(void* stream, std::function<void()> work) {
    if (setting("delayed") == 0 || is_default(stream)) return work();
    const std::scoped_lock guard(state().lock);
    state().streams.at(stream).push_back(std::move(work));
}

[[noreturn]] inline void misuse(const char* what) {
    std::fprintf(stderr, "fake libcuda: %s\n", what);
    std::abort();
}

/// Where the bytes of a piece of device memory really are; null unless it is within one allocation.
inline void* shadow_of(std::uint64_t address, std::uint64_t num_bytes) {
    const std::scoped_lock guard(state().lock);
    const auto* const region = region_of(state().allocations, address);
    if (region == nullptr || address + num_bytes > region->first + region->second) return nullptr;
    return reinterpret_cast<void*>(address + kSpan);
}

}  // namespace fake
