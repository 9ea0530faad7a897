// GPU memory under SPDK's queue: what has to hold before it is used, in which order it goes, and what is left behind
// when anything fails. On a fake libgdrapi and fake devices.
#include <dlfcn.h>

#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../spdk/gdr.hpp"
#include "check.hpp"
#include "fake_ops.hpp"

using namespace hcache;
using namespace hcache::spdk;
using namespace std::chrono_literals;
using Steps = std::vector<std::string>;

namespace {

constexpr std::uint64_t kWindowBytes = 4 << 20;

std::string library;
std::mutex steps_lock;
Steps steps;

void note(const std::string& step) {
    const std::scoped_lock guard(steps_lock);
    if (steps.empty() || steps.back() != step) steps.push_back(step);
}
Steps take_steps() {
    const std::scoped_lock guard(steps_lock);
    return std::exchange(steps, {});
}

/// The fake library's own functions.
struct Gpu {
    Gpu() : handle(::dlopen(library.c_str(), RTLD_NOW)) {
        CHECK(handle != nullptr);
        find(address, "fake_gpu_address");
        find(fail, "fake_gdr_fail");
        find(log, "fake_gdr_log");
        find(num_open, "fake_gdr_num_open");
        find(read, "fake_gpu_read");
        log([](const char* step) { note(step); });
    }
    template <typename Function>
    void find(Function*& function, const char* name) {
        function = reinterpret_cast<Function*>(::dlsym(handle, name));
        CHECK(function != nullptr);
    }
    void* handle;
    unsigned long (*address)();
    void (*fail)(const char*);
    void (*log)(void (*)(const char*));
    int (*num_open)();
    void (*read)(unsigned long, void*, std::size_t);
};

Gpu& gpu() {
    static Gpu only;
    return only;
}

struct Rig {
    Rig() : bytes(kWindowBytes) {
        std::mt19937 random(1);
        for (auto& byte : bytes) byte = static_cast<std::byte>(random());
        disk->bytes = bytes;
        fake::world().disks["rig"] = disk;
        fake::world().log = note;
        take_steps();
    }
    ~Rig() {
        device.reset();
        target.reset();
        controller.reset();
        fake::world().disks.clear();
        CHECK(fake::world().memory.empty());
        CHECK(gpu().num_open() == 0);
    }
    void open() {
        controller = std::make_shared<Controller>(fake::kOps, EnvOptions{}, "trtype:FAKE traddr:rig", 8);
        target = std::make_shared<Namespace>(controller, 1);
        device = std::make_unique<io::Device>([this] {
            auto made = std::make_unique<SpdkQueue>(controller);
            queue = made.get();
            return made;
        });
    }
    std::unique_ptr<GpuWindow> window(std::uint64_t address, std::uint64_t num_bytes) {
        return std::make_unique<GpuWindow>(std::make_shared<Gdr>(library), *device, *queue, target, 0, address,
                                           num_bytes);
    }
    std::unique_ptr<GpuWindow> window() { return window(gpu().address(), kWindowBytes); }

    std::vector<std::byte> bytes;
    std::shared_ptr<fake::Disk> disk = std::make_shared<fake::Disk>();
    std::shared_ptr<Controller> controller;
    std::shared_ptr<Namespace> target;
    SpdkQueue* queue = nullptr;
    std::unique_ptr<io::Device> device;
};

std::string reason(const std::function<void()>& make) {
    try {
        make();
    } catch (const std::runtime_error& error) {
        return error.what();
    }
    CHECK(false);
}

void reads_arrive_in_the_gpu() {
    Rig rig;
    rig.open();
    {
        const auto window = rig.window();
        CHECK(window->address() == gpu().address() && window->bytes().size() == kWindowBytes);
        const auto num_bounced = rig.queue->num_bounced();
        const io::Transfer transfer =
            rig.device->submit({{io::Op::read, rig.target, 0, window->bytes().data(), window->bytes().size()}});
        CHECK(transfer.wait(0, 60s) == std::int64_t{kWindowBytes});
        CHECK(rig.queue->num_bounced() == num_bounced);
        std::vector<std::byte> seen(kWindowBytes);
        gpu().read(gpu().address(), seen.data(), seen.size());
        CHECK(seen == rig.bytes);
    }
    const Steps expected{"open",    "pin",       "map",     "info",      "register",   "copy to", "copy from",
                         "copy to", "copy from", "copy to", "copy from", "unregister", "unmap",   "unpin"};
    CHECK(take_steps() == expected);
}

void ends_that_are_no_whole_pages_are_left_out() {
    Rig rig;
    rig.open();
    {
        const auto window = rig.window(gpu().address() + 100, 300'000);
        CHECK(window->address() == gpu().address() + kGpuPageBytes);
        CHECK(window->bytes().size() == 3 * kGpuPageBytes);
    }
    CHECK(reason([&] { rig.window(gpu().address() + 1, kGpuPageBytes); }).find("64 KiB") != std::string::npos);
    fake::world().register_align = 2 << 20;  // SPDK before 25.09
    {
        const auto window = rig.window(gpu().address(), kWindowBytes);
        CHECK(window->bytes().size() % (2 << 20) == 0 && window->bytes().size() >= 2 << 20);
        CHECK(reinterpret_cast<std::uintptr_t>(window->bytes().data()) % (2 << 20) == 0);
        std::byte first{};
        gpu().read(window->address(), &first, 1);
        CHECK(first == window->bytes()[0]);
    }
    fake::world().register_align = 4096;
}

void nothing_is_left_of_what_cannot_be_used() {
    Rig rig;
    rig.open();
    for (const char* step : {"open", "pin", "map", "info", "shifted", "copy to", "copy from", "version"}) {
        gpu().fail(step);
        reason([&] { rig.window(); });
        CHECK(gpu().num_open() == 0);
    }
    gpu().fail("");
    fake::world().lies = true;
    take_steps();
    CHECK(reason([&] { rig.window(); }).find("no address for page 0") != std::string::npos);
    fake::world().lies = false;
    CHECK((take_steps() == Steps{"open", "pin", "map", "info", "register", "unregister", "unmap", "unpin"}));
    CHECK(reason([&] { Gdr("libgdrapi-of-nobody.so"); }).find("not installed") != std::string::npos);
    rig.window();  // and it works once nothing fails
}

void memory_that_is_not_reached_is_found_out() {
    Rig rig;
    rig.open();
    const std::byte* window_start = nullptr;
    std::size_t num_proven = 0;
    rig.disk->swallows = [&](const std::byte* data) {  // all but the first page that is tried
        const std::scoped_lock guard(fake::world().lock);
        for (const auto& [start, range] : fake::world().memory) {
            if (!range.second && data >= start && data < start + range.first) window_start = start;
        }
        return window_start != nullptr && data >= window_start && num_proven++ > 0;
    };
    CHECK(reason([&] { rig.window(); }).find("did not arrive") != std::string::npos);
    CHECK(num_proven == 2);
    rig.disk->swallows = nullptr;
    rig.disk->script = [&](bool, std::uint64_t, std::uint32_t) { return num_proven++ > 2 ? -EIO : 0; };
    CHECK(reason([&] { rig.window(); }).find("cannot write to the GPU") != std::string::npos);
    rig.disk->script = nullptr;
    std::fill_n(rig.bytes.begin(), 4096, std::byte{0});
    CHECK(reason([&] { rig.window(); }).find("nothing to prove") != std::string::npos);
}

void a_socket_is_refused_before_anything_is_pinned() {
    Rig rig;
    rig.disk->needs_translation = false;
    rig.open();
    CHECK(reason([&] { rig.window(); }).find("socket") != std::string::npos);
    CHECK((take_steps() == Steps{"open"}));
}

void nothing_goes_while_a_transfer_is_in_flight() {
    Rig rig;
    rig.open();
    auto window = rig.window();
    rig.disk->held = true;
    const io::Transfer transfer = rig.device->submit({{io::Op::read, rig.target, 0, window->bytes().data(), 64 << 10}});
    CHECK(!transfer.wait(0, 20ms).has_value());
    take_steps();
    std::thread closing([&] { window.reset(); });
    std::this_thread::sleep_for(50ms);
    CHECK(take_steps().empty());
    rig.disk->held = false;
    closing.join();
    CHECK((take_steps() == Steps{"unregister", "unmap", "unpin"}));
    CHECK(transfer.wait(0, 60s) == 64 << 10);
}

void a_window_may_outlive_its_devices_thread() {
    Rig rig;
    rig.open();
    auto window = rig.window();
    rig.device->close();
    take_steps();
    window.reset();
    CHECK((take_steps() == Steps{"unregister", "unmap", "unpin"}));
    CHECK(reason([&] { rig.window(); }).find("closed") != std::string::npos);
}

}  // namespace

int main(int argc, char** argv) {
    CHECK(argc > 2);
    library = std::string(argv[2]) + "/libgdrapi.so.2";
    RUN(reads_arrive_in_the_gpu);
    RUN(ends_that_are_no_whole_pages_are_left_out);
    RUN(nothing_is_left_of_what_cannot_be_used);
    RUN(memory_that_is_not_reached_is_found_out);
    RUN(a_socket_is_refused_before_anything_is_pinned);
    RUN(nothing_goes_while_a_transfer_is_in_flight);
    RUN(a_window_may_outlive_its_devices_thread);
}
