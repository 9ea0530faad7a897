// Copies by several threads equal plain ones, touch no byte beside theirs, and none once they are done.
#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(start, num_bytes) (static_cast<void>(start), static_cast<void>(num_bytes))
#define ASAN_UNPOISON_MEMORY_REGION(start, num_bytes) (static_cast<void>(start), static_cast<void>(num_bytes))
#endif

#include "../io/copier.hpp"
#include "../io/slab.hpp"
#include "bytes.hpp"
#include "check.hpp"

using namespace hcache::io;

namespace {

void copies_are_exact() {
    std::mt19937 random(1);
    for (const unsigned num_threads : {0U, 1U, 2U, 5U}) {
        Copier copier(num_threads, 64 << 10);
        const Slab from(4 << 20), to(4 << 20);
        fill_with_noise(from.bytes(), num_threads);
        std::vector<std::byte> model(to.bytes().size());
        for (int round = 0; round < 10; ++round) {
            std::vector<Copy> copies;
            for (std::size_t at = random() % 1000; at < model.size();) {
                const std::size_t length = std::min<std::size_t>(random() % 700'000, model.size() - at);
                const std::size_t source = random() % (from.bytes().size() - length + 1);
                copies.push_back({to.bytes().data() + at, from.bytes().data() + source, length});
                std::memcpy(model.data() + at, from.bytes().data() + source, length);
                at += length + random() % 1000;
            }
            copier.run(copies);
            CHECK(same(model, to.bytes()));
        }
        copier.run({});
    }
}

void several_callers_do_not_mix() {
    Copier copier(3, 64 << 10);
    std::vector<std::thread> callers;
    for (unsigned own = 0; own < 4; ++own) {
        callers.emplace_back([&copier, own] {
            std::vector<std::byte> from(2 << 20), to(2 << 20);
            for (unsigned round = 0; round < 20; ++round) {
                std::memset(from.data(), static_cast<int>(own * 20 + round), from.size());
                const Copy copy{to.data(), from.data(), from.size()};
                copier.run({&copy, 1});
                CHECK(same(to, from));
            }
        });
    }
    for (auto& caller : callers) caller.join();
}

constexpr std::byte kPoison{0xA5};

/// Memory as large as it has to be, at an address of its own each time: a late touch is a use after free.
struct Rows {
    Rows(std::size_t runs, std::size_t length, std::size_t step)
        : num_runs(runs), run_bytes(length), stride(step), bytes(new std::byte[runs * step]) {
        std::fill_n(bytes.get(), num_runs * stride, kPoison);
    }
    ~Rows() { guard(false); }
    Rows(Rows&&) noexcept = default;
    std::byte* run(std::size_t idx) const { return bytes.get() + idx * stride; }
    /// Whether the gaps between runs must not even be read.
    void guard(bool on) const {
        if (!bytes) return;
        for (std::size_t idx = 0; idx < num_runs; ++idx) {
            if (on) {
                ASAN_POISON_MEMORY_REGION(run(idx) + run_bytes, stride - run_bytes);
            } else {
                ASAN_UNPOISON_MEMORY_REGION(run(idx) + run_bytes, stride - run_bytes);
            }
        }
    }
    std::size_t num_runs, run_bytes, stride;
    std::unique_ptr<std::byte[]> bytes;
};

/// Layers of rows, as a snapshot has them: short runs, runs that are streamed, runs that are cut; threads or none.
void strided_copies_touch_their_runs_alone() {
    std::mt19937 random(2);
    std::vector<std::byte> noise(400'000);
    std::generate(noise.begin(), noise.end(), [&] { return static_cast<std::byte>(random()); });
    for (const unsigned num_threads : {1U, 4U}) {
        Copier copier(num_threads, 16 << 10);
        for (int round = 0; round < 12; ++round) {
            std::vector<Rows> from, to;
            std::vector<Copy> copies;
            for (unsigned idx = 0; idx < 1 + random() % 6; ++idx) {
                const std::size_t num_runs = random() % 9;
                const std::size_t most = std::vector<std::size_t>{1, 100, 8 << 10, 90 << 10, 300 << 10}[random() % 5];
                const std::size_t length = random() % (most + 1);
                from.emplace_back(num_runs, length, length + random() % 5000);
                to.emplace_back(num_runs, length, length + random() % 5000);
                for (std::size_t run = 0; run < num_runs; ++run) {
                    std::copy_n(noise.data() + random() % 9999, length, from[idx].run(run));
                }
                copies.push_back({to[idx].run(0), from[idx].run(0), length, num_runs,
                                  static_cast<std::ptrdiff_t>(to[idx].stride),
                                  static_cast<std::ptrdiff_t>(from[idx].stride)});
                from[idx].guard(true);
                to[idx].guard(true);
            }
            copier.run(copies);
            for (std::size_t idx = 0; idx < copies.size(); ++idx) {
                from[idx].guard(false);
                to[idx].guard(false);
                for (std::size_t run = 0; run < to[idx].num_runs; ++run) {
                    const std::byte* first = to[idx].run(run);
                    const std::byte* rest = first + to[idx].run_bytes;
                    CHECK(std::equal(first, rest, from[idx].run(run)));
                    CHECK(std::all_of(rest, first + to[idx].stride, [](std::byte b) { return b == kPoison; }));
                }
            }
        }
    }
}

/// As a ring and its spans are used again at once by somebody else: under TSan a helper that comes late is a race.
void nothing_is_touched_after_the_return() {
    Copier copier(4, 4 << 10);
    std::vector<std::byte> ring(8 * 5 * 4096), span(8 * 64 * 4096);
    for (unsigned step = 0; step < 150; ++step) {
        const std::size_t row = step % 60;
        std::fill(ring.begin(), ring.end(), static_cast<std::byte>(step));
        const Copy copy{span.data() + row * 4096, ring.data(), 5 * 4096 - 7, 8, 64 * 4096, 5 * 4096};
        copier.run({&copy, 1});
        for (std::size_t layer = 0; layer < 8; ++layer) {
            const std::byte* rows = span.data() + (layer * 64 + row) * 4096;
            CHECK(
                std::all_of(rows, rows + 5 * 4096 - 7, [=](std::byte b) { return b == static_cast<std::byte>(step); }));
        }
        std::fill(span.begin(), span.end(), kPoison);
    }
}

}  // namespace

int main() {
    RUN(copies_are_exact);
    RUN(several_callers_do_not_mix);
    RUN(strided_copies_touch_their_runs_alone);
    RUN(nothing_is_touched_after_the_return);
}
