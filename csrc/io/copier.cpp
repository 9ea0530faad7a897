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
void copy_piece(const Copy& copy) {
    std::byte* target = copy.target;
    const std::byte* source = copy.source;
    std::size_t left = copy.length;
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
            copy_piece(pieces[idx]);
        }
        if (num_copied == 0) return;
        const std::scoped_lock guard(lock);
        num_left -= num_copied;
        if (num_left == 0) done.notify_all();
    }
};

Copier::Copier(unsigned num_threads) {
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
    auto work = std::make_shared<Work>();
    for (const Copy& copy : copies) {
        for (std::size_t start = 0; start < copy.length; start += kPieceBytes) {
            const std::size_t length = std::min(kPieceBytes, copy.length - start);
            work->pieces.push_back({copy.target + start, copy.source + start, length});
        }
    }
    work->num_left = work->pieces.size();
    const std::size_t num_helpers = std::min(threads_.size(), work->pieces.size() - !work->pieces.empty());
    if (num_helpers > 0) {
        const std::scoped_lock guard(lock_);
        for (std::size_t idx = 0; idx < num_helpers; ++idx) queue_.push_back(work);
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
