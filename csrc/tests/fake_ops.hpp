// SPDK in memory: namespaces that a test fills, breaks, holds up and looks at, behind the same table of functions.
//
// It is stricter than devices are: memory that it could not reach, a sector that is not there, a queue used on two
// threads, or a command that is still in flight when its queue's memory goes end the program.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "../spdk/ops.hpp"
#include "check.hpp"

namespace hcache::spdk::fake {

/// One controller with one namespace. Tests set it up before it is connected to; atomics may change at any time.
struct Disk {
    std::span<std::byte> bytes;
    std::uint32_t sector_bytes = 512;
    std::uint32_t max_transfer_bytes = 128 << 10;
    bool has_metadata = false;
    bool needs_translation = true;
    bool has_cache = true;
    /// What was not flushed is lost when the connection ends.
    bool forgets = false;
    /// How a command ends: 0 or a negative errno. On the queue's thread.
    std::function<int(bool is_write, std::uint64_t lba, std::uint32_t num_sectors)> script;
    /// Reads to such memory end well, and nothing arrives.
    std::function<bool(const std::byte* data)> swallows;
    /// Commands end in another order than they came.
    bool reversed = false;
    /// Commands in a qpair; more are -ENOMEM.
    std::size_t room = 1000;
    /// Nothing ends.
    std::atomic<bool> held{false};
    /// The device is gone: polling fails, and no qpair is to be had.
    std::atomic<bool> gone{false};
    /// It was gone: it has to be reset first.
    std::atomic<bool> stale{false};

    std::atomic<unsigned> num_commands{0};
    std::atomic<unsigned> num_full{0};
    std::atomic<unsigned> num_flushes{0};
    std::atomic<unsigned> num_qpairs{0};
    std::atomic<unsigned> num_connections{0};
    std::atomic<unsigned> most_in_flight{0};

    /// What writes since the last flush replaced: (offset, bytes).
    std::vector<std::pair<std::size_t, std::vector<std::byte>>> unflushed;
    /// The device's cache is lost, as it would be without power.
    void lose_power() {
        for (auto old = unflushed.rbegin(); old != unflushed.rend(); ++old) {
            std::copy(old->second.begin(), old->second.end(), bytes.begin() + static_cast<std::ptrdiff_t>(old->first));
        }
        unflushed.clear();
    }
};

/// All there is. `traddr` of a transport id is a disk's name, or the path of a file that is mapped as one, with
/// a cache where the id says `cache:on`.
struct World {
    std::mutex lock;
    std::map<std::string, std::shared_ptr<Disk>> disks;
    /// Reachable memory, by start: how long, and whether SPDK allocated it.
    std::map<const std::byte*, std::pair<std::size_t, bool>> memory;
    std::size_t register_align = 4096;
    /// Registering goes well and pages have no address.
    bool lies = false;
    std::size_t dma_left_bytes = std::size_t{1} << 30;
    /// Told of what the order matters of.
    std::function<void(const std::string&)> log = [](const std::string&) {};
};

inline World& world() {
    static World all;
    return all;
}

struct FakeCtrlr {
    std::shared_ptr<Disk> disk;
};

struct Pending {
    bool is_write, is_flush;
    std::byte* data;
    std::uint64_t lba;
    std::uint32_t num_sectors;
    Command* command;
};

struct FakeQpair {
    std::shared_ptr<Disk> disk;
    std::thread::id thread = std::this_thread::get_id();
    std::vector<Pending> pending;
};

inline FakeCtrlr& ctrlr_of(Ctrlr* ctrlr) {
    return *reinterpret_cast<FakeCtrlr*>(ctrlr);
}
inline Disk& disk_of(Ns* ns) {
    return *reinterpret_cast<Disk*>(ns);
}
inline FakeQpair& qpair_of(Qpair* qpair) {
    auto& found = *reinterpret_cast<FakeQpair*>(qpair);
    CHECK(found.thread == std::this_thread::get_id());
    return found;
}

inline bool reaches(const std::byte* data, std::size_t num_bytes) {
    const std::scoped_lock guard(world().lock);
    auto next = world().memory.upper_bound(data);
    if (next == world().memory.begin()) return false;
    const auto& [start, range] = *--next;
    return data + num_bytes <= start + range.first && (range.second || !world().lies);
}

/// The disk that is a file's bytes: it outlives the process.
inline std::shared_ptr<Disk> map_file(const std::string& path) {
    const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
    if (fd < 0) return nullptr;
    struct stat status {};
    CHECK(::fstat(fd, &status) == 0);
    const auto size = static_cast<std::size_t>(status.st_size);
    void* const data = size == 0 ? MAP_FAILED : ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    ::close(fd);
    if (data == MAP_FAILED) return nullptr;
    std::shared_ptr<Disk> disk(new Disk, [=](Disk* gone) {
        ::munmap(data, size);
        delete gone;
    });
    disk->bytes = {static_cast<std::byte*>(data), size};
    return disk;
}

inline std::string value_of(const std::string& transport_id, const std::string& key) {
    const std::size_t start = transport_id.find(key + ":");
    if (start == std::string::npos) return "";
    const std::size_t first = start + key.size() + 1;
    return transport_id.substr(first, transport_id.find(' ', first) - first);
}

inline Ctrlr* connect(const std::string& transport_id, unsigned, std::string& why) {
    const std::string name = value_of(transport_id, "traddr");
    std::shared_ptr<Disk> disk;
    {
        const std::scoped_lock guard(world().lock);
        const auto found = world().disks.find(name);
        if (found != world().disks.end()) disk = found->second;
    }
    if (!disk) {
        disk = map_file(name);
        if (disk) disk->has_cache = disk->forgets = value_of(transport_id, "cache") == "on";
    }
    if (!disk || disk->gone) {
        why = "no NVMe controller answers there";
        return nullptr;
    }
    ++disk->num_connections;
    return reinterpret_cast<Ctrlr*>(new FakeCtrlr{disk});
}

inline void disconnect(Ctrlr* ctrlr) {
    CHECK(ctrlr_of(ctrlr).disk->num_qpairs == 0);
    --ctrlr_of(ctrlr).disk->num_connections;
    if (ctrlr_of(ctrlr).disk->forgets) ctrlr_of(ctrlr).disk->lose_power();
    delete &ctrlr_of(ctrlr);
}

inline CtrlrShape describe(Ctrlr* ctrlr) {
    return {.model = "Fake",
            .serial = "F000",
            .firmware = "1",
            .needs_translation = ctrlr_of(ctrlr).disk->needs_translation,
            .namespace_ids = {1}};
}

inline Ns* open_namespace(Ctrlr* ctrlr, std::uint32_t id, NsShape& shape) {
    if (id != 1) return nullptr;
    Disk& disk = *ctrlr_of(ctrlr).disk;
    shape = {.sector_bytes = disk.sector_bytes,
             .num_sectors = disk.bytes.size() / disk.sector_bytes,
             .max_transfer_bytes = disk.max_transfer_bytes,
             .has_metadata = disk.has_metadata};
    return reinterpret_cast<Ns*>(&disk);
}

inline Qpair* alloc_qpair(Ctrlr* ctrlr, unsigned) {
    const auto& disk = ctrlr_of(ctrlr).disk;
    if (disk->gone || disk->stale) return nullptr;
    ++disk->num_qpairs;
    return reinterpret_cast<Qpair*>(new FakeQpair{.disk = disk, .pending = {}});
}

inline void free_qpair(Qpair* qpair) {
    FakeQpair& own = qpair_of(qpair);
    auto pending = std::move(own.pending);
    // as SPDK does: what is in flight hears of it, unless the device is gone
    if (!own.disk->gone) {
        for (const Pending& one : pending) one.command->done(*one.command, -EIO);
    }
    --own.disk->num_qpairs;
    delete &own;
}

inline int hand_over(Ns* ns, Qpair* qpair, const Pending& one) {
    Disk& disk = disk_of(ns);
    FakeQpair& own = qpair_of(qpair);
    CHECK(own.disk.get() == &disk);
    if (!one.is_flush) {
        const std::size_t num_bytes = std::size_t{one.num_sectors} * disk.sector_bytes;
        CHECK(one.num_sectors > 0);
        CHECK((one.lba + one.num_sectors) * disk.sector_bytes <= disk.bytes.size());
        if (disk.needs_translation) {
            CHECK(reinterpret_cast<std::uintptr_t>(one.data) % 4 == 0);
            CHECK(reaches(one.data, num_bytes));
        }
    }
    if (own.pending.size() >= disk.room) {
        ++disk.num_full;
        return -ENOMEM;
    }
    ++disk.num_commands;
    own.pending.push_back(one);
    disk.most_in_flight = std::max<unsigned>(disk.most_in_flight, static_cast<unsigned>(own.pending.size()));
    return 0;
}

inline int read(Ns* ns, Qpair* qpair, void* data, std::uint64_t lba, std::uint32_t num_sectors, Command& command) {
    return hand_over(ns, qpair, {false, false, static_cast<std::byte*>(data), lba, num_sectors, &command});
}

inline int write(Ns* ns, Qpair* qpair, const void* data, std::uint64_t lba, std::uint32_t num_sectors,
                 Command& command) {
    auto* const bytes = static_cast<std::byte*>(const_cast<void*>(data));
    return hand_over(ns, qpair, {true, false, bytes, lba, num_sectors, &command});
}

inline int flush(Ns* ns, Qpair* qpair, Command& command) {
    if (!disk_of(ns).has_cache) return 1;
    return hand_over(ns, qpair, {false, true, nullptr, 0, 0, &command});
}

inline int perform(Disk& disk, const Pending& one) {
    if (one.is_flush) {
        disk.unflushed.clear();
        ++disk.num_flushes;
        return 0;
    }
    const int error = disk.script ? disk.script(one.is_write, one.lba, one.num_sectors) : 0;
    if (error != 0) return error;
    const auto place =
        disk.bytes.subspan(one.lba * disk.sector_bytes, std::size_t{one.num_sectors} * disk.sector_bytes);
    if (one.is_write) {
        if (disk.has_cache)
            disk.unflushed.emplace_back(place.data() - disk.bytes.data(), std::vector(place.begin(), place.end()));
        std::memcpy(place.data(), one.data, place.size());
    } else if (!disk.swallows || !disk.swallows(one.data)) {
        std::memcpy(one.data, place.data(), place.size());
    }
    return 0;
}

inline int poll(Qpair* qpair) {
    FakeQpair& own = qpair_of(qpair);
    if (own.disk->gone) {
        own.disk->stale = true;
        return -ENXIO;
    }
    if (own.disk->held || own.pending.empty()) return 0;
    auto pending = std::move(own.pending);  // commands that `done` hands over are another poll's
    own.pending.clear();
    if (own.disk->reversed) std::reverse(pending.begin(), pending.end());
    for (const Pending& one : pending) one.command->done(*one.command, perform(*own.disk, one));
    return static_cast<int>(pending.size());
}

inline int register_memory(void* start, std::size_t num_bytes) {
    const std::size_t align = world().register_align;
    if (reinterpret_cast<std::uintptr_t>(start) % align != 0 || num_bytes % align != 0) return -EINVAL;
    const std::scoped_lock guard(world().lock);
    world().log("register");
    return world().memory.try_emplace(static_cast<std::byte*>(start), num_bytes, false).second ? 0 : -EBUSY;
}

inline int unregister_memory(void* start, std::size_t num_bytes) {
    const std::scoped_lock guard(world().lock);
    const auto found = world().memory.find(static_cast<std::byte*>(start));
    CHECK(found != world().memory.end() && found->second.first == num_bytes);
    world().memory.erase(found);
    world().log("unregister");
    return 0;
}

inline void* dma_alloc(std::size_t num_bytes) {
    const std::scoped_lock guard(world().lock);
    if (num_bytes > world().dma_left_bytes) return nullptr;
    auto* const data = static_cast<std::byte*>(std::aligned_alloc(4096, num_bytes));
    world().dma_left_bytes -= num_bytes;
    world().memory[data] = {num_bytes, true};
    return data;
}

inline void dma_free(void* memory) {
    const std::scoped_lock guard(world().lock);
    const auto found = world().memory.find(static_cast<std::byte*>(memory));
    CHECK(found != world().memory.end() && found->second.second);
    world().dma_left_bytes += found->second.first;
    world().memory.erase(found);
    std::free(memory);
}

inline constexpr Ops kOps{
    .env_init = [](const EnvOptions&) { return 0; },
    .connect = connect,
    .disconnect = disconnect,
    .describe = describe,
    .open_namespace = open_namespace,
    .alloc_qpair = alloc_qpair,
    .reset =
        [](Ctrlr* ctrlr) {
            if (ctrlr_of(ctrlr).disk->gone) return -ENXIO;
            ctrlr_of(ctrlr).disk->stale = false;
            return 0;
        },
    .free_qpair = free_qpair,
    .read = read,
    .write = write,
    .flush = flush,
    .poll = poll,
    .poll_admin = [](Ctrlr*) {},
    .register_memory = register_memory,
    .unregister_memory = unregister_memory,
    .translates = [](const void* page) { return reaches(static_cast<const std::byte*>(page), 4096); },
    .dma_alloc = dma_alloc,
    .dma_free = dma_free,
};

}  // namespace hcache::spdk::fake
