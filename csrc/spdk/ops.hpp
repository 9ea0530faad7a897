// What of SPDK is used here, as a table of functions: the library's own (real_ops.cpp), or a fake of the tests.
//
// SPDK's rules that callers keep: `env_init` once in a process; a qpair's functions on one thread at a time; memory of
// a command stays where it is until the command's `done` was called; no command twice at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace hcache::spdk {

/// The library's own things; never looked into.
struct Ctrlr;
struct Ns;
struct Qpair;

/// A command in flight. `done` is called by `poll` or `free_qpair`, on the qpair's thread: 0 or a negative errno.
struct Command {
    void (*done)(Command& command, int error) = nullptr;
};

/// How DPDK, below SPDK, is to begin.
struct EnvOptions {
    bool hugepages = true;
    /// Look for devices on the PCI bus; not needed for NVMe over fabrics.
    bool pci = true;
    /// Memory to take at the start; 0 leaves it to DPDK. Must be given without huge pages.
    int memory_mib = 0;
};

struct CtrlrShape {
    std::string model;
    std::string serial;
    std::string firmware;
    /// The device reads and writes memory by itself, so that addresses have to be translated for it.
    bool needs_translation = true;
    std::vector<std::uint32_t> namespace_ids;
};

struct NsShape {
    std::uint32_t sector_bytes = 0;
    std::uint64_t num_sectors = 0;
    /// Most that the device takes in one command. Longer ones are split by SPDK.
    std::uint32_t max_transfer_bytes = 0;
    /// Sectors carry metadata between their data: not for us.
    bool has_metadata = false;
};

struct Ops {
    /// 0 or a negative errno. Leaves the caller's CPU affinity as it was.
    int (*env_init)(const EnvOptions& options);
    /// Null when it fails; `why` says so. `requests_per_qpair`: commands of a qpair, parts of split ones included.
    Ctrlr* (*connect)(const std::string& transport_id, unsigned requests_per_qpair, std::string& why);
    void (*disconnect)(Ctrlr* ctrlr);
    CtrlrShape (*describe)(Ctrlr* ctrlr);
    /// Null when there is no such active namespace.
    Ns* (*open_namespace)(Ctrlr* ctrlr, std::uint32_t id, NsShape& shape);
    /// Null when there are no more, or the controller has to be reset.
    Qpair* (*alloc_qpair)(Ctrlr* ctrlr, unsigned depth);
    /// After a controller was gone: connect to it anew, which fails its other qpairs. May take seconds. 0 or a negative
    /// errno.
    int (*reset)(Ctrlr* ctrlr);
    /// Ends what is in flight, by `done` or, where the device is gone, without it; the memory is free in either case.
    void (*free_qpair)(Qpair* qpair);
    /// 0, -ENOMEM when the queue is full (try again after `poll`), or another negative errno; `done` only after 0.
    int (*read)(Ns* ns, Qpair* qpair, void* data, std::uint64_t lba, std::uint32_t num_sectors, Command& command);
    int (*write)(Ns* ns, Qpair* qpair, const void* data, std::uint64_t lba, std::uint32_t num_sectors,
                 Command& command);
    /// As `read`. 1 when the device has no cache to flush.
    int (*flush)(Ns* ns, Qpair* qpair, Command& command);
    /// Calls `done` of what has ended; how many, or a negative errno when the qpair has failed.
    int (*poll)(Qpair* qpair);
    /// Keeps the connection alive; now and then.
    void (*poll_admin)(Ctrlr* ctrlr);
    /// 0 or a negative errno. That it went well does not mean that the memory can be used: see `translates`.
    int (*register_memory)(void* start, std::size_t num_bytes);
    int (*unregister_memory)(void* start, std::size_t num_bytes);
    /// Whether the device has an address for the page at `page`.
    bool (*translates)(const void* page);
    /// Memory that the device can use, aligned to 4 KiB; null when there is none left.
    void* (*dma_alloc)(std::size_t num_bytes);
    void (*dma_free)(void* memory);
};

/// SPDK itself, null where it was not built in.
const Ops* real_ops();

}  // namespace hcache::spdk
