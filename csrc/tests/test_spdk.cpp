// SPDK's queue under the engine, on a fake device: placement, order, full queues, alignment, copies, failures.
#include <cstdint>
#include <random>
#include <stdexcept>

#include "../io/slab.hpp"
#include "check.hpp"
#include "spdk_rig.hpp"

namespace {

void bytes_lie_where_they_were_put() {
    for (const std::uint32_t sector_bytes : {512U, 4096U}) {
        for (const bool reversed : {false, true}) {
            Rig rig(4 << 20);
            rig.disk->sector_bytes = sector_bytes;
            rig.disk->reversed = reversed;
            rig.open();
            std::vector<std::byte> model(rig.bytes.size());
            std::mt19937 random(1);
            for (int round = 0; round < 60; ++round) {
                std::vector<io::Request> requests;
                std::vector<std::vector<std::byte>> buffers;
                const bool is_write = round % 2 == 0;
                for (std::size_t part = 0; part < 4; ++part) {  // parts of the namespace that do not overlap
                    const std::size_t offset = part * (1 << 20) + random() % 1000 * 512 / sector_bytes * sector_bytes;
                    const std::size_t length = (1 + random() % 1000) * 512 / sector_bytes * sector_bytes;
                    buffers.push_back(noise(length, static_cast<unsigned>(random())));
                    auto& data = buffers.back();
                    if (is_write) std::copy(data.begin(), data.end(), model.begin() + std::ptrdiff_t(offset));
                    requests.push_back({is_write ? Op::write : Op::read, rig.target, offset, data.data(), length});
                }
                const io::Transfer transfer = rig.device->submit(requests);
                CHECK(transfer.wait_all(60s));
                for (std::size_t part = 0; part < 4; ++part) {
                    const auto& request = requests[part];
                    CHECK(transfer.wait(part, 0ms) == std::int64_t(request.length));
                    CHECK(same(buffers[part], std::span(model).subspan(request.offset, request.length)));
                }
            }
            CHECK(same(rig.bytes, model));
        }
    }
}

void full_queues_are_waited_for() {
    Rig rig(1 << 20, 16);
    rig.disk->room = 3;
    rig.open();
    auto data = noise(1 << 20, 2);
    std::vector<io::Request> requests;
    for (std::size_t start = 0; start < data.size(); start += 4096) {
        requests.push_back({Op::write, rig.target, start, &data[start], 4096});
    }
    CHECK(rig.device->submit(requests).wait_all(60s));
    CHECK(same(rig.bytes, data));
    CHECK(rig.disk->num_full > 0);
    CHECK(rig.disk->most_in_flight == 3);
}

void a_queue_that_never_has_room_says_so() {
    Rig rig;
    rig.disk->room = 0;
    rig.open();
    std::vector<std::byte> data(512);
    CHECK(rig.move(Op::read, 0, data) == -ENOMEM);
}

void only_whole_sectors_that_are_there() {
    Rig rig(64 << 10);
    rig.open();
    std::vector<std::byte> data(8192);
    CHECK(rig.move(Op::read, 100, data) == -EINVAL);
    CHECK(rig.move(Op::write, 0, std::span(data).first(700)) == -EINVAL);
    CHECK(rig.move(Op::read, (64 << 10) - 4096, data) == 4096);
    CHECK(rig.move(Op::read, 64 << 10, data) == 0);
    CHECK(rig.move(Op::write, 64 << 10, data) == -ENOSPC);
    CHECK(rig.move(Op::write, ~std::uint64_t{511}, data) == -ENOSPC);
    CHECK(rig.disk->num_commands == 1);
}

void memory_that_the_device_reaches_is_used_in_place() {
    Rig rig(2 << 20);
    rig.open();
    const io::Slab slab(1 << 20);
    bool taken = false;
    const auto lend = [&](io::Queue& queue) { taken = queue.lend(slab.bytes()); };
    const auto data = slab.bytes();
    std::fill(data.begin(), data.end(), std::byte{7});
    CHECK(rig.move(Op::write, 0, data) == 1 << 20);
    CHECK(rig.queue->num_bounced() == (1 << 20) / kBounceBytes);
    rig.device->run(lend);
    CHECK(taken);
    const auto num_before = rig.queue->num_bounced();
    CHECK(rig.move(Op::write, 1 << 20, data) == 1 << 20);
    CHECK(rig.queue->num_bounced() == num_before);
    CHECK(rig.move(Op::write, 0, data.subspan(2, 512)) == 512);  // NVMe wants addresses that are multiples of 4
    CHECK(rig.queue->num_bounced() == num_before + 1);
    rig.device->run([&](io::Queue& queue) { queue.take_back(slab.bytes()); });
    CHECK(rig.move(Op::read, 0, data.first(512)) == 512);
    CHECK(rig.queue->num_bounced() == num_before + 2);
    rig.device->run(lend);  // and the device ends before it is taken back
    CHECK(taken);
}

void memory_without_addresses_is_not_trusted() {
    Rig rig;
    rig.open();
    const io::Slab slab(4 << 20);
    bool taken = true;
    const auto lend = [&](io::Queue& queue) { taken = queue.lend(slab.bytes()); };
    fake::world().lies = true;  // as vfio-user does: registered well, and no address
    rig.device->run(lend);
    fake::world().lies = false;
    CHECK(!taken);
    CHECK(rig.move(Op::write, 0, slab.bytes().first(8192)) == 8192);
    CHECK(rig.queue->num_bounced() == 1);
    fake::world().register_align = 2 << 20;  // as SPDK before 25.09 wants it
    rig.device->run(lend);
    CHECK(taken);
    CHECK(rig.move(Op::write, 0, slab.bytes().subspan(2 << 20, 8192)) == 8192);
    rig.device->run([&](io::Queue& queue) { queue.take_back(slab.bytes()); });
    const io::Slab small(64 << 10);
    rig.device->run([&](io::Queue& queue) { taken = queue.lend(small.bytes()); });
    CHECK(!taken);
    fake::world().register_align = 4096;
}

void a_socket_takes_any_memory() {
    Rig rig;
    rig.disk->needs_translation = false;
    rig.open();
    auto data = noise(4097, 3);
    CHECK(rig.move(Op::write, 0, std::span(data).subspan(1)) == 4096);
    CHECK(rig.queue->num_bounced() == 0);
    CHECK(std::equal(data.begin() + 1, data.end(), rig.bytes.begin()));
    CHECK(fake::world().memory.empty());
}

void without_memory_for_copies_it_goes_on_with_less_or_says_so() {
    Rig rig(4 << 20);
    rig.open();
    auto data = noise(4 << 20, 4);
    fake::world().dma_left_bytes = 1000;
    CHECK(rig.move(Op::write, 0, data) == -ENOMEM);
    fake::world().dma_left_bytes = kBounceBytes;
    std::vector<io::Request> requests;
    for (std::size_t start = 0; start < data.size(); start += 512 << 10) {
        requests.push_back({Op::write, rig.target, start, &data[start], 512 << 10});
    }
    CHECK(rig.device->submit(requests).wait_all(60s));
    CHECK(rig.bytes == data);
    rig.device.reset();
    fake::world().dma_left_bytes = std::size_t{1} << 30;
}

void errors_are_the_requests_own() {
    Rig rig;
    rig.disk->script = [](bool is_write, std::uint64_t lba, std::uint32_t) {
        return lba == 8 ? (is_write ? -EROFS : -EIO) : 0;
    };
    rig.open();
    std::vector<std::byte> data(3 * 4096);
    std::vector<io::Request> requests;
    for (std::size_t idx = 0; idx < 3; ++idx) {
        requests.push_back({Op::read, rig.target, idx * 4096, &data[idx * 4096], 4096});
    }
    const io::Transfer transfer = rig.device->submit(requests);
    CHECK(transfer.wait(0, 60s) == 4096 && transfer.wait(1, 60s) == -EIO && transfer.wait(2, 60s) == 4096);
    CHECK(rig.move(Op::write, 4096, std::span(data).first(512)) == -EROFS);
}

void flush_makes_writes_outlive_the_power() {
    Rig rig;
    rig.open();
    auto first = noise(8192, 5), second = noise(8192, 6);
    CHECK(rig.move(Op::write, 0, first) == 8192);
    CHECK(rig.flush() == 0);
    CHECK(rig.move(Op::write, 0, second) == 8192);
    rig.disk->lose_power();
    CHECK(std::equal(first.begin(), first.end(), rig.bytes.begin()));
    CHECK(rig.disk->num_flushes == 1);
    rig.disk->has_cache = false;
    CHECK(rig.flush() == 0);
    CHECK(rig.disk->num_flushes == 1);
}

void a_device_that_goes_and_comes_back() {
    Rig rig;
    rig.open();
    std::vector<std::byte> data(64 << 10);
    rig.disk->held = true;
    {
        const io::Transfer transfer = rig.device->submit({{Op::read, rig.target, 0, data.data(), data.size()}});
        CHECK(!transfer.wait(0, 20ms).has_value());
        rig.disk->gone = true;  // and says nothing more about what was in flight
        CHECK(transfer.wait(0, 60s) == -EIO);
    }
    CHECK(rig.move(Op::read, 0, data) == -ENODEV);
    CHECK(rig.flush() == -ENODEV);
    rig.disk->gone = false;
    rig.disk->held = false;
    const auto deadline = std::chrono::steady_clock::now() + 60s;
    while (rig.move(Op::read, 0, data) != std::int64_t(data.size())) {
        CHECK(std::chrono::steady_clock::now() < deadline);
        std::this_thread::sleep_for(20ms);
    }
    CHECK(rig.flush() == 0);
}

void many_threads_share_a_queue() {
    Rig rig(1 << 20, 3);
    rig.disk->room = 2;
    rig.open();
    std::vector<std::thread> threads;
    for (unsigned own = 0; own < 4; ++own) {
        threads.emplace_back([&, own] {
            for (unsigned round = 0; round < 50; ++round) {
                auto data = noise(8192, own * 1000 + round);
                std::vector<std::byte> out(data.size());
                CHECK(rig.move(Op::write, own * 8192, data) == 8192);
                CHECK(rig.move(Op::read, own * 8192, out) == 8192);
                CHECK(out == data);
            }
        });
    }
    for (auto& thread : threads) thread.join();
}

template <typename Make>
std::string reason(const Make& make) {
    try {
        make();
    } catch (const std::runtime_error& error) {
        return error.what();
    }
    CHECK(false);
}

void what_cannot_be_used_is_refused_with_the_reason() {
    Rig rig;
    const auto open = [&] { rig.open(); };
    rig.disk->has_metadata = true;
    CHECK(reason(open).find("metadata") != std::string::npos);
    rig.disk->has_metadata = false;
    rig.disk->sector_bytes = 520;
    CHECK(reason(open).find("520") != std::string::npos);
    rig.disk->sector_bytes = 512;
    rig.open();
    CHECK(reason([&] { Namespace(rig.controller, 2); }).find("no active namespace 2") != std::string::npos);
    CHECK(reason([&] { Controller(fake::kOps, {}, "traddr:nobody", 1); }).find("answers") != std::string::npos);
    rig.disk->gone = true;
    CHECK(reason([&] { SpdkQueue(rig.controller); }).find("no queue") != std::string::npos);
}

}  // namespace

int main() {
    RUN(bytes_lie_where_they_were_put);
    RUN(full_queues_are_waited_for);
    RUN(a_queue_that_never_has_room_says_so);
    RUN(only_whole_sectors_that_are_there);
    RUN(memory_that_the_device_reaches_is_used_in_place);
    RUN(memory_without_addresses_is_not_trusted);
    RUN(a_socket_takes_any_memory);
    RUN(without_memory_for_copies_it_goes_on_with_less_or_says_so);
    RUN(errors_are_the_requests_own);
    RUN(flush_makes_writes_outlive_the_power);
    RUN(a_device_that_goes_and_comes_back);
    RUN(many_threads_share_a_queue);
    RUN(what_cannot_be_used_is_refused_with_the_reason);
}
