#include "copies.hpp"

#include <algorithm>

namespace hcache::gpu {
namespace {

constexpr char kBatchCopy[] = "cuMemcpyBatchAsync";

/// The default stream that waits for all others: batches are refused on it.
bool is_legacy(Handle stream) {
    return reinterpret_cast<std::uintptr_t>(stream) <= 1;  // null, CU_STREAM_LEGACY
}

}  // namespace

std::vector<Copy> merged(std::span<const Copy> copies) {
    std::vector<Copy> few;
    few.reserve(copies.size());
    for (const Copy& copy : copies) {
        if (copy.num_bytes == 0) continue;
        if (!few.empty() && few.back().to + few.back().num_bytes == copy.to &&
            few.back().from + few.back().num_bytes == copy.from) {
            few.back().num_bytes += copy.num_bytes;
        } else {
            few.push_back(copy);
        }
    }
    return few;
}

Copies::Copies(std::shared_ptr<Gpu> gpu)
    : gpu_(std::move(gpu)),
      batch_13_(reinterpret_cast<BatchCopy13>(gpu_->driver().find(kBatchCopy, 13000))),
      batch_12_(batch_13_ != nullptr ? nullptr
                                     : reinterpret_cast<BatchCopy12>(gpu_->driver().find(kBatchCopy, 12080))) {}

const char* Copies::how() const {
    if (is_batch_refused_) return "one by one (this GPU refuses batches)";
    if (batch_13_ != nullptr) return "in batches (CUDA 13)";
    return batch_12_ != nullptr ? "in batches (CUDA 12.8)" : "one by one (the driver is older than CUDA 12.8)";
}

std::size_t Copies::run(std::span<const Copy> copies, Handle stream) {
    const Gpu::Current current(*gpu_);
    const std::vector<Copy> few = merged(copies);
    const Result result = try_run(few, stream);
    if (result == kSuccess) return few.size();
    // No copy may go across the seam of two regions that were pinned, or allocated, one behind the other. What has been
    // queued already is queued again: that brings the same bytes to the same places.
    if (result != kInvalidValue || few.size() == copies.size()) gpu_->driver().check(result, "copying to the GPU");
    std::vector<Copy> all(copies.begin(), copies.end());
    std::erase_if(all, [](const Copy& copy) { return copy.num_bytes == 0; });
    gpu_->driver().check(try_run(all, stream), "copying to the GPU");
    return all.size();
}

Result Copies::try_run(std::span<const Copy> copies, Handle stream) {
    const bool has_batches = (batch_13_ != nullptr || batch_12_ != nullptr) && !is_legacy(stream);
    while (has_batches && !is_batch_refused_ && copies.size() > 1) {
        const std::size_t count = std::min(copies.size(), kMaxPerCall);
        const Result result = batch(copies.first(count), stream);
        if (result == kNotSupported) {
            is_batch_refused_ = true;
            break;
        }
        if (result != kSuccess) return result;
        copies = copies.subspan(count);
    }
    for (const Copy& copy : copies) {
        const auto* const from = reinterpret_cast<const void*>(copy.from);
        const Result result = gpu_->driver().copy_in(copy.to, from, copy.num_bytes, stream);
        if (result != kSuccess) return result;
    }
    return kSuccess;
}

Result Copies::batch(std::span<const Copy> copies, Handle stream) const {
    Address to[kMaxPerCall], from[kMaxPerCall];
    std::size_t num_bytes[kMaxPerCall];
    for (std::size_t idx = 0; idx < copies.size(); ++idx) {
        to[idx] = copies[idx].to;
        from[idx] = copies[idx].from;
        num_bytes[idx] = copies[idx].num_bytes;
    }
    CopyAttributes attributes{kInStreamOrder, {}, {}, 0};
    std::size_t first = 0, failed = 0;
    if (batch_13_ != nullptr) return batch_13_(to, from, num_bytes, copies.size(), &attributes, &first, 1, stream);
    return batch_12_(to, from, num_bytes, copies.size(), &attributes, &first, 1, &failed, stream);
}

}  // namespace hcache::gpu
