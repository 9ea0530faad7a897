// A device of the fake world with an engine on it, and bytes to move.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "../io/device.hpp"
#include "../spdk/queue.hpp"
#include "bytes.hpp"
#include "check.hpp"
#include "fake_ops.hpp"

using namespace hcache;
using namespace hcache::spdk;
using namespace std::chrono_literals;
using io::Op;

/// A device of the fake world with an engine on it.
struct Rig {
    explicit Rig(std::size_t num_bytes = 1 << 20, unsigned depth = 8) : bytes(num_bytes), wanted_depth(depth) {
        disk->bytes = bytes;
        fake::world().disks["rig"] = disk;
    }
    ~Rig() {
        device.reset();
        target.reset();
        controller.reset();
        CHECK(disk->num_qpairs == 0 && disk->num_connections == 0);
        fake::world().disks.clear();
        CHECK(fake::world().memory.empty());
    }
    void open() {
        controller = std::make_shared<Controller>(fake::kOps, EnvOptions{}, "trtype:FAKE traddr:rig", wanted_depth);
        target = std::make_shared<Namespace>(controller, 1);
        device = std::make_unique<io::Device>([this] {
            auto made = std::make_unique<SpdkQueue>(controller);
            queue = made.get();
            return made;
        });
    }
    std::int64_t move(Op op, std::uint64_t offset, std::span<std::byte> data) {
        const io::Transfer transfer = device->submit({{op, target, offset, data.data(), data.size()}});
        const auto result = transfer.wait(0, 60s);
        CHECK(result.has_value());
        return *result;
    }
    int flush() {
        int result = 1;
        CHECK(device->run([&](io::Queue& own) { result = own.flush(*target); }));
        return result;
    }

    std::vector<std::byte> bytes;
    unsigned wanted_depth;
    std::shared_ptr<fake::Disk> disk = std::make_shared<fake::Disk>();
    std::shared_ptr<Controller> controller;
    std::shared_ptr<Namespace> target;
    SpdkQueue* queue = nullptr;
    std::unique_ptr<io::Device> device;
};
