// The engine on a scripted device: every way an attempt can end, and every way a batch can.
#include <cstdint>
#include <random>
#include <stdexcept>

#include "check.hpp"
#include "memory_queue.hpp"

using namespace hcache::io;
using namespace hcache::io::test;
using namespace std::chrono_literals;

namespace {

std::vector<std::byte> noise(std::size_t num_bytes, unsigned seed) {
    std::mt19937 random(seed);
    std::vector<std::byte> bytes(num_bytes);
    for (auto& byte : bytes) byte = static_cast<std::byte>(random());
    return bytes;
}

std::int64_t result_of(const Transfer& transfer, std::size_t idx = 0) {
    const auto result = transfer.wait(idx, 60s);
    CHECK(result.has_value());
    return *result;
}

void whole_batches_arrive() {
    for (const bool reversed : {false, true}) {
        Disk disk{.bytes = noise(100'000, 1), .reversed = reversed};
        Device device(on(disk));
        const auto file = some_file();
        std::vector<std::byte> out(100'000);
        std::vector<Request> requests;
        for (std::size_t start = 0; start < out.size(); start += 1000) {
            requests.push_back({Op::read, file, start, &out[start], 1000});
        }
        const Transfer transfer = device.submit(requests);
        CHECK(transfer.wait_all(60s));
        for (std::size_t idx = 0; idx < transfer.size(); ++idx) CHECK(result_of(transfer, idx) == 1000);
        CHECK(out == disk.bytes);
        CHECK(disk.most_in_flight == 4);
        CHECK(device.stats().num_attempts == 100);
    }
}

void short_transfers_are_carried_on() {
    std::mt19937 random(2);
    Disk disk{.bytes = std::vector<std::byte>(50'000)};
    disk.script = [&](const Attempt&) -> std::int64_t {
        switch (random() % 4) {
            case 0:
                return -EINTR;
            case 1:
                return -EAGAIN;
            default:
                return 1 + random() % 700;
        }
    };
    Device device(on(disk));
    const auto file = some_file();
    auto bytes = noise(50'000, 3);
    CHECK(result_of(device.submit({{Op::write, file, 0, bytes.data(), bytes.size()}})) == 50'000);
    CHECK(disk.bytes == bytes);
    std::vector<std::byte> out(bytes.size());
    CHECK(result_of(device.submit({{Op::read, file, 0, out.data(), out.size()}})) == 50'000);
    CHECK(out == bytes);
    CHECK(device.stats().num_carried_on >= 2 * 50'000 / 700);
}

void errors_are_the_requests_own() {
    Disk disk{.bytes = noise(4000, 4)};
    disk.script = [](const Attempt& attempt) -> std::int64_t { return attempt.offset == 1000 ? -EIO : kPass; };
    Device device(on(disk));
    const auto file = some_file();
    std::vector<std::byte> out(4000);
    std::vector<Request> requests;
    for (std::size_t start = 0; start < 4000; start += 1000)
        requests.push_back({Op::read, file, start, &out[start], 1000});
    const Transfer transfer = device.submit(requests);
    const std::int64_t expected[] = {1000, -EIO, 1000, 1000};
    for (std::size_t idx = 0; idx < 4; ++idx) CHECK(result_of(transfer, idx) == expected[idx]);
    CHECK(device.stats().num_errors == 1);
}

void a_device_that_always_says_again_is_given_up() {
    Disk disk{.bytes = noise(10, 5)};
    disk.script = [](const Attempt&) -> std::int64_t { return -EAGAIN; };
    Device device(on(disk));
    std::byte out;
    CHECK(result_of(device.submit({{Op::read, some_file(), 0, &out, 1}})) == -EAGAIN);
}

void ends() {
    Disk disk{.bytes = noise(1500, 6)};
    Device device(on(disk));
    const auto file = some_file();
    std::vector<std::byte> bytes(1000);
    CHECK(result_of(device.submit({{Op::read, file, 1000, bytes.data(), 1000}})) == 500);
    CHECK(result_of(device.submit({{Op::read, file, 9000, bytes.data(), 1000}})) == 0);
    CHECK(result_of(device.submit({{Op::write, file, 9000, bytes.data(), 1000}})) == -EIO);
    CHECK(result_of(device.submit({{Op::read, file, 0, bytes.data(), 0}})) == 0);
    CHECK(device.submit({}).wait_all(0ms));
}

void a_cancellation_ends_what_was_submitted_and_nothing_else() {
    Disk disk{.bytes = noise(4000, 8)};
    std::atomic<bool> hangs{true};
    disk.script = [&](const Attempt&) -> std::int64_t { return kPass; };
    const Fault fault = [&](const Attempt& attempt) -> std::int64_t {
        if (!hangs) return kPass;
        return attempt.offset == 0 ? kStuck : kHold;
    };
    Device device([&] { return std::make_unique<FaultyQueue>(std::make_unique<MemoryQueue>(disk, 2), fault); });
    const auto file = some_file();
    std::vector<std::byte> out(3000);
    std::vector<Request> requests;
    for (std::size_t start = 0; start < 3000; start += 1000)
        requests.push_back({Op::read, file, start, &out[start], 1000});
    const Transfer transfer = device.submit(requests);
    device.run([](Queue&) {});
    device.cancel();
    CHECK(result_of(transfer, 1) == -ECANCELED);  // held
    CHECK(result_of(transfer, 2) == -ECANCELED);  // had not begun
    CHECK(!transfer.wait(0, 20ms));               // hangs for good
    disk.cancelled = false;                       // the inner queue had nothing in flight
    hangs = false;
    CHECK(result_of(transfer, 0) == 1000);
    CHECK(result_of(device.submit({{Op::read, file, 2000, out.data(), 1000}})) == 1000);
}

void a_refused_direct_transfer_goes_through_the_page_cache() {
    Disk disk{.bytes = noise(8192, 7)};
    const auto file = some_file();
    unsigned num_refused = 0;
    disk.script = [&](const Attempt& attempt) -> std::int64_t {
        if (!attempt.target->may_go_direct(attempt.offset, attempt.data, attempt.length)) return kPass;
        ++num_refused;
        return -EINVAL;
    };
    Device device(on(disk));
    alignas(4096) static std::byte out[4096];
    if (!file->is_direct()) return;  // nothing to refuse: no O_DIRECT for memfd on this kernel
    CHECK(result_of(device.submit({{Op::read, file, 0, out, 4096}})) == 4096);
    CHECK(!file->is_direct());
    CHECK(result_of(device.submit({{Op::read, file, 0, out, 4096}})) == 4096);
    CHECK(num_refused == 1);
    disk.script = [](const Attempt&) -> std::int64_t { return -EINVAL; };
    CHECK(result_of(device.submit({{Op::read, file, 0, out, 4096}})) == -EINVAL);
}

void no_request_outlives_its_buffer() {
    Disk disk{.bytes = noise(1 << 20, 8)};
    disk.script = [](const Attempt&) -> std::int64_t {
        std::this_thread::sleep_for(1ms);
        return kPass;
    };
    Device device(on(disk, 2));
    const auto file = some_file();
    for (int round = 0; round < 20; ++round) {
        std::vector<std::byte> out(64 * 1024);  // freed right after the transfer: the sanitizers would see a late write
        std::vector<Request> requests;
        for (std::size_t start = 0; start < out.size(); start += 1024) {
            requests.push_back({Op::read, file, start, &out[start], 1024});
        }
        const Transfer transfer = device.submit(requests);
        if (round % 2) result_of(transfer, 1);
    }
    CHECK(disk.num_enqueued < 20 * 64 / 2);
}

void closing_ends_what_waits_and_waits_for_what_flies() {
    Disk disk{.bytes = noise(1000, 9)};
    disk.held = true;
    Device device(on(disk, 2));
    std::vector<std::byte> out(10);
    std::vector<Request> requests;
    const auto file = some_file();
    for (std::size_t idx = 0; idx < 10; ++idx) requests.push_back({Op::read, file, idx, &out[idx], 1});
    const Transfer transfer = device.submit(requests);
    CHECK(!transfer.wait(0, 20ms).has_value());
    CHECK(!transfer.wait_all(0ms));
    device.close();
    device.close();
    for (std::size_t idx = 0; idx < 10; ++idx) CHECK(result_of(transfer, idx) == -ECANCELED);
    CHECK(disk.num_enqueued == 2);
    CHECK(result_of(device.submit({{Op::read, file, 0, out.data(), 1}})) == -ECANCELED);
    CHECK(!device.run([](Queue&) {}));
}

void many_threads_share_a_device() {
    Disk disk{.bytes = std::vector<std::byte>(8 * 4096)};
    std::mt19937 random(10);
    disk.script = [&](const Attempt&) -> std::int64_t { return random() % 8 ? kPass : 100; };
    Device device(on(disk, 3));
    const auto file = some_file();
    std::vector<std::thread> threads;
    for (unsigned own = 0; own < 8; ++own) {
        threads.emplace_back([&, own] {
            for (unsigned round = 0; round < 100; ++round) {
                auto bytes = noise(4096, own * 1000 + round);
                std::vector<std::byte> out(4096);
                CHECK(result_of(device.submit({{Op::write, file, own * 4096, bytes.data(), 4096}})) == 4096);
                CHECK(result_of(device.submit({{Op::read, file, own * 4096, out.data(), 4096}})) == 4096);
                CHECK(out == bytes);
                CHECK(device.run([](Queue& queue) { CHECK(queue.depth() == 3); }));
            }
        });
    }
    for (auto& thread : threads) thread.join();
}

void submitting_and_closing_may_race() {
    for (unsigned round = 0; round < 50; ++round) {
        Disk disk{.bytes = noise(100, round)};
        Device device(on(disk));
        const auto file = some_file();
        std::thread other([&] {
            std::byte out{};
            for (unsigned idx = 0; idx < 50; ++idx) {
                const std::int64_t result = result_of(device.submit({{Op::read, file, idx, &out, 1}}));
                CHECK(result == -ECANCELED || (result == 1 && out == disk.bytes[idx]));
                device.run([](Queue&) {});
            }
        });
        device.close();
        other.join();
    }
}

void a_queue_that_cannot_be_made_is_told() {
    try {
        Device device([]() -> std::unique_ptr<Queue> { throw std::runtime_error("no ring"); });
        CHECK(false);
    } catch (const std::runtime_error& error) {
        CHECK(std::string(error.what()) == "no ring");
    }
}

void faults_come_before_the_device() {
    Disk disk{.bytes = noise(3000, 11)};
    std::vector<std::int64_t> verdicts{-ENOSPC, 0, 700, kPass};
    std::size_t next = 0;
    Device device([&] {
        return std::make_unique<FaultyQueue>(std::make_unique<MemoryQueue>(disk, 4),
                                             [&](const Attempt&) { return verdicts[next++]; });
    });
    const auto file = some_file();
    std::vector<std::byte> out(1000);
    CHECK(result_of(device.submit({{Op::write, file, 0, out.data(), 1000}})) == -ENOSPC);
    CHECK(result_of(device.submit({{Op::read, file, 0, out.data(), 1000}})) == 0);
    CHECK(disk.num_enqueued == 0);
    CHECK(result_of(device.submit({{Op::read, file, 0, out.data(), 1000}})) == 1000);
    CHECK(disk.num_enqueued == 2);
    CHECK(std::equal(out.begin(), out.end(), disk.bytes.begin()));
}

void a_delay_holds_up_nobody_else() {
    Disk disk{.bytes = noise(2000, 12)};
    std::atomic<bool> is_slow{true};
    Device device([&] {
        return std::make_unique<FaultyQueue>(std::make_unique<MemoryQueue>(disk, 4), [&](const Attempt& attempt) {
            return is_slow && attempt.offset == 0 ? kHold : kPass;
        });
    });
    const auto file = some_file();
    std::vector<std::byte> out(2000);
    const Transfer slow = device.submit({{Op::read, file, 0, out.data(), 1000}});
    CHECK(result_of(device.submit({{Op::read, file, 1000, &out[1000], 1000}})) == 1000);
    CHECK(!slow.wait(0, 20ms).has_value());
    is_slow = false;
    CHECK(result_of(slow) == 1000);
    CHECK(out == disk.bytes);
    is_slow = true;
    const Transfer held = device.submit({{Op::read, file, 0, out.data(), 1000}});
    CHECK(!held.wait(0, 5ms).has_value());
    device.close();
    CHECK(result_of(held) == -ECANCELED);
}

}  // namespace

int main() {
    RUN(whole_batches_arrive);
    RUN(short_transfers_are_carried_on);
    RUN(errors_are_the_requests_own);
    RUN(a_device_that_always_says_again_is_given_up);
    RUN(ends);
    RUN(a_cancellation_ends_what_was_submitted_and_nothing_else);
    RUN(a_refused_direct_transfer_goes_through_the_page_cache);
    RUN(no_request_outlives_its_buffer);
    RUN(closing_ends_what_waits_and_waits_for_what_flies);
    RUN(many_threads_share_a_device);
    RUN(submitting_and_closing_may_race);
    RUN(a_queue_that_cannot_be_made_is_told);
    RUN(faults_come_before_the_device);
    RUN(a_delay_holds_up_nobody_else);
}
