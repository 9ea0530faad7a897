// Copies from the host for fake_cuda.cpp: one by one, and in batches as two versions of CUDA have them.
#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "fake_state.hpp"

namespace fake {

/// One copy from the host, once its stream has come to it; null when the driver would refuse it. From pinned memory it
/// reads when it runs; other memory is read at once, as the driver's staging does.
inline std::function<void()> copy_of(std::uint64_t to, std::uint64_t from, std::size_t num_bytes) {
    void* const target = shadow_of(to, num_bytes);
    if (target == nullptr) return nullptr;
    const auto* const source = reinterpret_cast<const char*>(from);
    {
        const std::scoped_lock guard(state().lock);
        const auto* const first = region_of(state().pinned, from);
        const auto* const last = region_of(state().pinned, from + num_bytes - 1);
        if (first != last) return nullptr;  // across the end of what was pinned
        if (first == nullptr) {
            return [target, staged = std::vector<char>(source, source + num_bytes)] {
                std::memcpy(target, staged.data(), staged.size());
            };
        }
    }
    return [=] {
        {
            const std::scoped_lock guard(state().lock);
            if (region_of(state().pinned, from) == nullptr) misuse("memory was unpinned before a copy had read it");
        }
        std::memcpy(target, source, num_bytes);
    };
}

inline int batch(const std::uint64_t* to, const std::uint64_t* from, const std::size_t* num_bytes, std::size_t num,
                 const int* attributes, const std::size_t* first_of_each, std::size_t num_attributes,
                 std::size_t* failed, void* stream) {
    if (current_context == nullptr || !is_stream(stream)) return kInvalidContext;
    if (setting("batch_error") != 0) return static_cast<int>(setting("batch_error"));
    if (reinterpret_cast<std::uintptr_t>(stream) <= 1) return kInvalidValue;
    if (num == 0 || num_attributes != 1 || first_of_each[0] != 0 || attributes[0] != 1) return kInvalidValue;
    std::vector<std::function<void()>> all;
    Regions targets;
    for (std::size_t idx = 0; idx < num; ++idx) {
        const auto next = targets.lower_bound(to[idx]);
        if (region_of(targets, to[idx]) != nullptr ||
            (next != targets.end() && next->first < to[idx] + num_bytes[idx])) {
            misuse("copies of a batch overlap, and come in any order");
        }
        targets[to[idx]] = num_bytes[idx];
        if (failed != nullptr) *failed = idx;
        all.push_back(num_bytes[idx] == 0 ? nullptr : copy_of(to[idx], from[idx], num_bytes[idx]));
        if (!all.back()) return kInvalidValue;
    }
    count("batches", 1);
    {
        const std::scoped_lock guard(state().lock);
        long& largest = state().counts["largest_batch"];
        largest = std::max(largest, static_cast<long>(num));
    }
    enqueue(stream, [all = std::move(all)] {
        for (auto work = all.rbegin(); work != all.rend(); ++work) (*work)();
    });
    return 0;
}

inline int batch_12(const std::uint64_t* to, const std::uint64_t* from, const std::size_t* num_bytes, std::size_t num,
                    const int* attributes, const std::size_t* first_of_each, std::size_t num_attributes,
                    std::size_t* failed, void* stream) {
    if (failed == nullptr) misuse("cuMemcpyBatchAsync of CUDA 12.8 says where it failed");
    return batch(to, from, num_bytes, num, attributes, first_of_each, num_attributes, failed, stream);
}

inline int batch_13(const std::uint64_t* to, const std::uint64_t* from, const std::size_t* num_bytes, std::size_t num,
                    const int* attributes, const std::size_t* first_of_each, std::size_t num_attributes, void* stream) {
    return batch(to, from, num_bytes, num, attributes, first_of_each, num_attributes, nullptr, stream);
}

}  // namespace fake
