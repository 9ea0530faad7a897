#include "copier.hpp"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdint>
#include <cstring>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace hcache::io {
namespace {

constexpr std::size_t kPieceBytes = std::size_t{256} << 10;  // large enough to hide the hand-out, small enough to share
constexpr std::size_t kStreamBytes = std::size_t{64} << 10;

/// State is copied to be read much later or by a GPU: stores that go around the CPU's caches need not first fetch what
/// they overwrite, a third of a copy's traffic. memcpy does so itself, but only for copies much larger than a chunk.
void copy_run(std::byte* target, const std::byte* source, std::size_t left) {
#ifdef __SSE2__
    if (left >= kStreamBytes) {
        const std::size_t head = -reinterpret_cast<std::uintptr_t>(target) % 64;
        std::memcpy(target, source, head);
        target += head;
        source += head;
        left -= head;
        for (; left >= 64; target += 64, source += 64, left -= 64) {
            const auto* from = reinterpret_cast<const __m128i*>(source);
            auto* to = reinterpret_cast<__m128i*>(target);
            const __m128i a = _mm_loadu_si128(from), b = _mm_loadu_si128(from + 1);
            const __m128i c = _mm_loadu_si128(from + 2), d = _mm_loadu_si128(from + 3);
            _mm_stream_si128(to, a);
            _mm_stream_si128(to + 1, b);
            _mm_stream_si128(to + 2, c);
            _mm_stream_si128(to + 3, d);
        }
        _mm_sfence();  // before anybody is told that the copy is done
    }
#endif
    std::memcpy(target, source, left);
}

void copy_runs(const Copy& copy) {
    std::byte* target = copy.target;
    const std::byte* source = copy.source;
    for (std::size_t run = 0; run < copy.num_runs; ++run) {
        copy_run(target, source, copy.length);
        if (run + 1 == copy.num_runs) break;  // no pointer beyond what it points into
        target += copy.target_stride;
        source += copy.source_stride;
    }
}

/// Long runs are cut, short ones stay together.
void cut(const Copy& copy, std::vector<Copy>& pieces) {
    const std::size_t num_together = std::max<std::size_t>(1, kPieceBytes / std::max<std::size_t>(1, copy.length));
    for (std::size_t run = 0; run < copy.num_runs; run += num_together) {
        Copy piece = copy;
        piece.target += static_cast<std::ptrdiff_t>(run) * copy.target_stride;
        piece.source += static_cast<std::ptrdiff_t>(run) * copy.source_stride;
        piece.num_runs = std::min(num_together, copy.num_runs - run);
        for (std::size_t start = 0; start < copy.length; start += piece.length) {
            piece.length = num_together > 1 ? copy.length : std::min(kPieceBytes, copy.length - start);
            pieces.push_back(piece);
            piece.target += piece.length;
            piece.source += piece.length;
        }
    }
}

}  // namespace

struct Copier::Work {
    std::vector<Copy> pieces;
    std::atomic<std::size_t> next{0};
    std::size_t num_left = 0;
    std::mutex lock;
    std::condition_variable done;

    /// Copy pieces until none is left to take.
    void help() {
        std::size_t num_copied = 0;
        for (std::size_t idx; (idx = next.fetch_add(1)) < pieces.size(); ++num_copied) {
            copy_runs(pieces[idx]);
        }
        if (num_copied == 0) return;
        const std::scoped_lock guard(lock);
        num_left -= num_copied;
        if (num_left == 0) done.notify_all();
    }
};

Copier::Copier(unsigned num_threads, std::size_t bytes_per_thread)
    : bytes_per_thread_(std::max<std::size_t>(1, bytes_per_thread)) {
    sigset_t all, before;  // signals are for the threads of the program that we are part of
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (unsigned idx = 1; idx < num_threads; ++idx) threads_.emplace_back([this] { work(); });
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

Copier::~Copier() {
    {
        const std::scoped_lock guard(lock_);
        ending_ = true;
    }
    wanted_.notify_all();
    for (auto& thread : threads_) thread.join();
}

void Copier::run(std::span<const Copy> copies) {
    std::size_t num_bytes = 0;
    for (const Copy& copy : copies) num_bytes += copy.length * copy.num_runs;
    const std::size_t num_shares = num_bytes / bytes_per_thread_;
    const std::size_t num_helpers = std::min(threads_.size(), num_shares - (num_shares > 0));
    if (num_helpers == 0) {
        for (const Copy& copy : copies) copy_runs(copy);
        return;
    }
    auto work = std::make_shared<Work>();
    for (const Copy& copy : copies) cut(copy, work->pieces);
    work->num_left = work->pieces.size();
    {
        const std::scoped_lock guard(lock_);
        queue_.insert(queue_.end(), num_helpers, work);
    }
    for (std::size_t idx = 0; idx < num_helpers; ++idx) wanted_.notify_one();
    work->help();
    std::unique_lock guard(work->lock);
    work->done.wait(guard, [&] { return work->num_left == 0; });
}

void Copier::work() {
    while (true) {
        std::shared_ptr<Work> work;
        {
            std::unique_lock guard(lock_);
            wanted_.wait(guard, [this] { return ending_ || !queue_.empty(); });
            if (queue_.empty()) return;
            work = std::move(queue_.back());
            queue_.pop_back();
        }
        work->help();
    }
}

}  // namespace hcache::io
