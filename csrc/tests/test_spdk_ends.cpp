// How what is in flight on SPDK's queue ends early: called back, or because the device is closed.
#include "check.hpp"
#include "spdk_rig.hpp"

namespace {

/// More than the queue's depth, none of which ends.
io::Transfer ten_reads(Rig& rig, std::vector<std::byte>& data) {
    std::vector<io::Request> requests;
    for (std::size_t idx = 0; idx < 10; ++idx) {
        requests.push_back({Op::read, rig.target, idx * 512, &data[idx * 512], 512});
    }
    io::Transfer transfer = rig.device->submit(requests);
    CHECK(!transfer.wait(0, 20ms).has_value());
    return transfer;
}

void a_device_that_was_called_back_is_of_use_again() {
    Rig rig(1 << 20, 2);
    rig.disk->held = true;
    rig.open();
    std::vector<std::byte> data(10 * 512);
    const io::Transfer transfer = ten_reads(rig, data);
    rig.device->cancel();
    for (std::size_t idx = 0; idx < 10; ++idx) CHECK(transfer.wait(idx, 60s) == -ECANCELED);
    rig.disk->held = false;
    const auto deadline = std::chrono::steady_clock::now() + 60s;
    while (rig.move(Op::read, 0, data) != std::int64_t(data.size())) {
        CHECK(std::chrono::steady_clock::now() < deadline);
        std::this_thread::sleep_for(20ms);
    }
}

/// False when what was called back landed too late, as on a machine that is busy.
bool lands_in_time() {
    Rig rig;
    rig.disk->held = true;
    rig.open();
    std::vector<std::byte> data(512), later(512);
    const io::Transfer first = rig.device->submit({{Op::read, rig.target, 0, data.data(), data.size()}});
    CHECK(!first.wait(0, 20ms).has_value());
    rig.device->cancel();
    rig.device->run([](io::Queue&) {});  // what is submitted from here on was not meant
    rig.disk->held = false;
    const auto result = first.wait(0, 60s);
    if (result == -ECANCELED) return false;
    CHECK(result == 512);
    rig.disk->held = true;
    const io::Transfer second = rig.device->submit({{Op::read, rig.target, 0, later.data(), later.size()}});
    CHECK(!second.wait(0, 400ms).has_value());
    rig.disk->held = false;
    CHECK(second.wait(0, 60s) == 512);
    return true;
}

void what_lands_in_time_after_a_call_back_costs_nobody_else_anything() {
    unsigned num_tries = 0;
    while (!lands_in_time()) CHECK(++num_tries < 20);
}

void closing_ends_a_device_that_stalls() {
    Rig rig(1 << 20, 2);
    rig.disk->held = true;
    rig.open();
    std::vector<std::byte> data(10 * 512);
    const io::Transfer transfer = ten_reads(rig, data);
    rig.device->close();
    for (std::size_t idx = 0; idx < 10; ++idx) CHECK(transfer.wait(idx, 0ms) == -ECANCELED);
    CHECK(rig.disk->num_commands == 2);
}

void closing_lets_what_flies_land() {
    Rig rig;
    rig.disk->held = true;
    rig.open();
    auto data = noise(512, 7);
    const io::Transfer transfer = rig.device->submit({{Op::write, rig.target, 0, data.data(), data.size()}});
    CHECK(!transfer.wait(0, 20ms).has_value());
    std::thread later([&] {
        std::this_thread::sleep_for(20ms);
        rig.disk->held = false;
    });
    rig.device->close();
    later.join();
    CHECK(transfer.wait(0, 0ms) == 512);
    CHECK(std::equal(data.begin(), data.end(), rig.bytes.begin()));
}

}  // namespace

int main() {
    RUN(a_device_that_was_called_back_is_of_use_again);
    RUN(what_lands_in_time_after_a_call_back_costs_nobody_else_anything);
    RUN(closing_ends_a_device_that_stalls);
    RUN(closing_lets_what_flies_land);
}
