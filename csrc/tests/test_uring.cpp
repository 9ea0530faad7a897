// The ring on real files: aligned and not, registered and not, at the end of a file, while it closes.
#include <fcntl.h>
#include <unistd.h>

#include <random>
#include <string>

#include "../io/device.hpp"
#include "../io/slab.hpp"
#include "../io/uring.hpp"
#include "check.hpp"

using namespace hcache::io;
using namespace std::chrono_literals;

namespace {

std::string folder;

Device::MakeQueue ring(unsigned depth) {
    return [depth] { return std::make_unique<UringQueue>(depth); };
}

struct Scratch {
    Scratch() {
        std::string path = folder + "/uring-test-XXXXXX";
        fd = ::mkstemp(path.data());
        CHECK(fd >= 0);
        ::unlink(path.c_str());
        file = std::make_shared<File>(fd);
    }
    ~Scratch() { ::close(fd); }
    int fd;
    std::shared_ptr<File> file;
};

std::int64_t move(Device& device, Op op, const std::shared_ptr<File>& file, std::uint64_t offset, std::byte* data,
                  std::size_t length) {
    const Transfer transfer = device.submit({{op, file, offset, data, length}});
    const auto result = transfer.wait(0, 60s);
    CHECK(result.has_value());
    return *result;
}

void files_hold_what_was_written() {
    Device device(ring(8));
    Scratch scratch;
    const Slab slab(1 << 20);
    const auto memory = slab.bytes();
    for (const bool lent : {false, true}) {
        bool taken = false;
        device.run([&](Queue& queue) { taken = lent && queue.lend(memory); });
        CHECK(taken == lent);
        std::mt19937 random(lent);
        std::vector<std::byte> model;
        for (int round = 0; round < 300; ++round) {
            const bool aligned = random() % 2;
            const std::uint64_t unit = aligned ? 4096 : 1;
            const std::uint64_t offset = random() % 200'000 / unit * unit;
            const std::uint64_t length = (1 + random() % 100'000 / unit) * unit;
            const std::uint64_t start = random() % 100'000 / unit * unit;
            std::byte* const data = memory.data() + start;
            if (random() % 2) {
                for (std::uint64_t idx = 0; idx < length; ++idx) data[idx] = static_cast<std::byte>(random());
                CHECK(move(device, Op::write, scratch.file, offset, data, length) == std::int64_t(length));
                if (model.size() < offset + length) model.resize(offset + length);
                std::copy(data, data + length, model.begin() + std::int64_t(offset));
            } else {
                const std::int64_t expected = std::clamp<std::int64_t>(
                    std::int64_t(model.size()) - std::int64_t(offset), 0, std::int64_t(length));
                CHECK(move(device, Op::read, scratch.file, offset, data, length) == expected);
                CHECK(std::equal(data, data + expected, model.begin() + std::int64_t(std::min(offset, model.size()))));
            }
        }
        CHECK(::ftruncate(scratch.fd, 0) == 0);
        device.run([&](Queue& queue) { queue.take_back(memory); });
    }
    if (scratch.file->is_direct()) CHECK(device.stats().num_direct > 200);
    device.forget(*scratch.file);
    CHECK(move(device, Op::write, scratch.file, 0, memory.data(), 4096) == 4096);
}

void errors_have_their_numbers() {
    Device device(ring(2));
    const int fd = ::open("/dev/full", O_RDWR | O_CLOEXEC);
    CHECK(fd >= 0);
    const auto full = std::make_shared<File>(fd);
    ::close(fd);
    std::byte data[10]{};
    CHECK(move(device, Op::write, full, 0, data, 10) == -ENOSPC);
    const int read_only = ::open("/dev/zero", O_RDONLY | O_CLOEXEC);
    const auto zero = std::make_shared<File>(read_only);
    ::close(read_only);
    CHECK(move(device, Op::write, zero, 0, data, 10) == -EBADF);
    CHECK(move(device, Op::read, zero, 0, data, 10) == 10);
}

/// A pipe that nobody writes to: a read of it never ends by itself, as on a device that stalls.
void a_stalled_read_ends_when_the_device_closes() {
    int ends[2];
    CHECK(::pipe2(ends, O_CLOEXEC) == 0);
    {
        Device device(ring(1));
        const auto pipe = std::make_shared<File>(ends[0]);
        std::byte data[3]{};
        const Transfer transfer =
            device.submit({{Op::read, pipe, ~0ULL, &data[0], 1}, {Op::read, pipe, ~0ULL, &data[1], 1}});
        CHECK(!transfer.wait(0, 20ms).has_value());
        device.close();
        CHECK(transfer.wait(0, 60s) == -ECANCELED);
        CHECK(transfer.wait(1, 60s) == -ECANCELED);
    }
    ::close(ends[0]);
    ::close(ends[1]);
}

void a_stalled_read_can_be_called_back() {
    int ends[2];
    CHECK(::pipe2(ends, O_CLOEXEC) == 0);
    {
        Device device(ring(1));
        const auto pipe = std::make_shared<File>(ends[0]);
        std::byte data[3]{};
        for (unsigned round = 0; round < 3; ++round) {  // the ring goes on listening for who wakes it
            const Transfer transfer =
                device.submit({{Op::read, pipe, ~0ULL, &data[0], 1}, {Op::read, pipe, ~0ULL, &data[1], 1}});
            CHECK(!transfer.wait(0, 20ms).has_value());
            device.cancel();
            CHECK(transfer.wait(0, 60s) == -ECANCELED);
            CHECK(transfer.wait(1, 60s) == -ECANCELED);
            const Transfer next = device.submit({{Op::read, pipe, ~0ULL, &data[2], 1}});
            CHECK(::write(ends[1], "x", 1) == 1);
            CHECK(next.wait(0, 60s) == 1);
        }
    }
    ::close(ends[0]);
    ::close(ends[1]);
}

void many_files_and_threads() {
    Device device(ring(16));
    std::vector<std::thread> threads;
    for (unsigned own = 0; own < 4; ++own) {
        threads.emplace_back([&, own] {
            const Slab slab(64 * 4096);
            for (unsigned round = 0; round < 10; ++round) {
                Scratch scratch;
                std::vector<Request> requests;
                for (std::size_t idx = 0; idx < 64; ++idx) {
                    std::byte* const data = slab.bytes().data() + idx * 4096;
                    std::fill(data, data + 4096, static_cast<std::byte>(own * 64 + round + idx));
                    requests.push_back({Op::write, scratch.file, (63 - idx) * 4096, data, 4096});
                }
                CHECK(device.submit(requests).wait_all(60s));
                std::byte last[4096];
                CHECK(::pread(scratch.fd, last, 4096, 5 * 4096) == 4096);
                CHECK(last[17] == static_cast<std::byte>(own * 64 + round + 58));
                device.forget(*scratch.file);
            }
        });
    }
    for (auto& thread : threads) thread.join();
}

}  // namespace

int main(int argc, char** argv) {
    folder = argc > 1 ? argv[1] : ".";
    if (const char* why = why_no_uring()) {
        std::printf("skipped: %s\n", why);
        return 77;
    }
    RUN(files_hold_what_was_written);
    RUN(errors_have_their_numbers);
    RUN(a_stalled_read_ends_when_the_device_closes);
    RUN(a_stalled_read_can_be_called_back);
    RUN(many_files_and_threads);
}
