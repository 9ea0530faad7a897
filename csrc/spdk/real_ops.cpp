// SPDK's NVMe driver and environment, and nothing of its event framework: the threads are ours.
#include "ops.hpp"

#ifndef HCACHE_WITH_SPDK

namespace hcache::spdk {

const Ops* real_ops() {
    return nullptr;
}

}  // namespace hcache::spdk

#else

#include <pthread.h>
#include <sched.h>

#include <cerrno>
#include <cstring>

extern "C" {
#include <spdk/env.h>
#include <spdk/nvme.h>
}

namespace hcache::spdk {
namespace {

spdk_nvme_ctrlr* theirs(Ctrlr* ctrlr) {
    return reinterpret_cast<spdk_nvme_ctrlr*>(ctrlr);
}
spdk_nvme_ns* theirs(Ns* ns) {
    return reinterpret_cast<spdk_nvme_ns*>(ns);
}
spdk_nvme_qpair* theirs(Qpair* qpair) {
    return reinterpret_cast<spdk_nvme_qpair*>(qpair);
}

int first_cpu_of(const cpu_set_t& cpus) {
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
        if (CPU_ISSET(cpu, &cpus)) return cpu;
    }
    return 0;
}

/// Newer releases want it, older ones have no such field.
template <typename Options>
void set_size(Options& options) {
    if constexpr (requires { options.opts_size; }) options.opts_size = sizeof options;
}

int env_init(const EnvOptions& options) {
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    const bool is_known = pthread_getaffinity_np(pthread_self(), sizeof cpus, &cpus) == 0;
    const std::string core = "[" + std::to_string(is_known ? first_cpu_of(cpus) : 0) + "]";
    spdk_env_opts env;
    std::memset(&env, 0, sizeof env);
    set_size(env);
    spdk_env_opts_init(&env);
    env.name = "mii_hcache";
    env.core_mask = core.c_str();
    env.no_pci = !options.pci;
    env.no_huge = !options.hugepages;
    if (options.memory_mib > 0) env.mem_size = options.memory_mib;
    const int error = spdk_env_init(&env);
    if (is_known) pthread_setaffinity_np(pthread_self(), sizeof cpus, &cpus);  // DPDK binds whoever starts it
    return error;
}

Ctrlr* connect(const std::string& transport_id, unsigned requests_per_qpair, std::string& why) {
    spdk_nvme_transport_id id{};
    if (spdk_nvme_transport_id_parse(&id, transport_id.c_str()) != 0) {
        why = "SPDK does not understand the transport id";
        return nullptr;
    }
    spdk_nvme_ctrlr_opts options{};
    spdk_nvme_ctrlr_get_default_ctrlr_opts(&options, sizeof options);
    options.io_queue_requests = requests_per_qpair;
    spdk_nvme_ctrlr* ctrlr = spdk_nvme_connect(&id, &options, sizeof options);
    if (ctrlr == nullptr) why = "no NVMe controller answers there";
    return reinterpret_cast<Ctrlr*>(ctrlr);
}

void disconnect(Ctrlr* ctrlr) {
    spdk_nvme_detach(theirs(ctrlr));
}

std::string text_of(const void* field, std::size_t length) {
    std::string text(static_cast<const char*>(field), length);
    text.erase(text.find_last_not_of(std::string(" \0", 2)) + 1);
    return text;
}

CtrlrShape describe(Ctrlr* ctrlr) {
    const spdk_nvme_ctrlr_data* data = spdk_nvme_ctrlr_get_data(theirs(ctrlr));
    const spdk_nvme_transport_id* id = spdk_nvme_ctrlr_get_transport_id(theirs(ctrlr));
    CtrlrShape shape;
    shape.model = text_of(data->mn, sizeof data->mn);
    shape.serial = text_of(data->sn, sizeof data->sn);
    shape.firmware = text_of(data->fr, sizeof data->fr);
    shape.needs_translation = id->trtype != SPDK_NVME_TRANSPORT_TCP;  // a socket copies: any memory will do
    for (std::uint32_t ns = spdk_nvme_ctrlr_get_first_active_ns(theirs(ctrlr)); ns != 0;
         ns = spdk_nvme_ctrlr_get_next_active_ns(theirs(ctrlr), ns)) {
        shape.namespace_ids.push_back(ns);
    }
    return shape;
}

Ns* open_namespace(Ctrlr* ctrlr, std::uint32_t id, NsShape& shape) {
    spdk_nvme_ns* ns = spdk_nvme_ctrlr_get_ns(theirs(ctrlr), id);
    if (ns == nullptr || !spdk_nvme_ns_is_active(ns)) return nullptr;
    shape.sector_bytes = spdk_nvme_ns_get_sector_size(ns);
    shape.num_sectors = spdk_nvme_ns_get_num_sectors(ns);
    shape.max_transfer_bytes = spdk_nvme_ns_get_max_io_xfer_size(ns);
    shape.has_metadata = spdk_nvme_ns_get_md_size(ns) != 0;
    return reinterpret_cast<Ns*>(ns);
}

Qpair* alloc_qpair(Ctrlr* ctrlr, unsigned depth) {
    spdk_nvme_io_qpair_opts options{};
    spdk_nvme_ctrlr_get_default_io_qpair_opts(theirs(ctrlr), &options, sizeof options);
    // A target may have shorter queues than SPDK's default and refuses longer ones; SPDK queues what does not fit.
    if (options.io_queue_size > depth + 1) options.io_queue_size = depth + 1;
    return reinterpret_cast<Qpair*>(spdk_nvme_ctrlr_alloc_io_qpair(theirs(ctrlr), &options, sizeof options));
}

int reset(Ctrlr* ctrlr) {
    return spdk_nvme_ctrlr_reset(theirs(ctrlr));
}

void free_qpair(Qpair* qpair) {
    spdk_nvme_ctrlr_free_io_qpair(theirs(qpair));
}

constexpr unsigned kWriteProtected = 0x20;  // of NVMe 1.4; older headers have no name for it

int errno_of(const spdk_nvme_cpl* completion) {
    if (!spdk_nvme_cpl_is_error(completion)) return 0;
    if (completion->status.sct == SPDK_NVME_SCT_GENERIC) {
        switch (completion->status.sc) {
            case SPDK_NVME_SC_LBA_OUT_OF_RANGE:
            case SPDK_NVME_SC_CAPACITY_EXCEEDED:
                return -ENOSPC;
            case kWriteProtected:
                return -EROFS;
            default:
                break;
        }
    }
    return -EIO;
}

void on_done(void* argument, const spdk_nvme_cpl* completion) {
    Command& command = *static_cast<Command*>(argument);
    command.done(command, errno_of(completion));
}

int read(Ns* ns, Qpair* qpair, void* data, std::uint64_t lba, std::uint32_t num_sectors, Command& command) {
    return spdk_nvme_ns_cmd_read(theirs(ns), theirs(qpair), data, lba, num_sectors, on_done, &command, 0);
}

int write(Ns* ns, Qpair* qpair, const void* data, std::uint64_t lba, std::uint32_t num_sectors, Command& command) {
    return spdk_nvme_ns_cmd_write(theirs(ns), theirs(qpair), const_cast<void*>(data), lba, num_sectors, on_done,
                                  &command, 0);
}

int flush(Ns* ns, Qpair* qpair, Command& command) {
    if ((spdk_nvme_ns_get_flags(theirs(ns)) & SPDK_NVME_NS_FLUSH_SUPPORTED) == 0) return 1;
    return spdk_nvme_ns_cmd_flush(theirs(ns), theirs(qpair), on_done, &command);
}

int poll(Qpair* qpair) {
    return spdk_nvme_qpair_process_completions(theirs(qpair), 0);
}

void poll_admin(Ctrlr* ctrlr) {
    spdk_nvme_ctrlr_process_admin_completions(theirs(ctrlr));
}

bool translates(const void* page) {
    return spdk_vtophys(page, nullptr) != SPDK_VTOPHYS_ERROR;
}

void* dma_alloc(std::size_t num_bytes) {
    return spdk_dma_zmalloc(num_bytes, 4096, nullptr);
}

constexpr Ops kReal{
    .env_init = env_init,
    .connect = connect,
    .disconnect = disconnect,
    .describe = describe,
    .open_namespace = open_namespace,
    .alloc_qpair = alloc_qpair,
    .reset = reset,
    .free_qpair = free_qpair,
    .read = read,
    .write = write,
    .flush = flush,
    .poll = poll,
    .poll_admin = poll_admin,
    .register_memory = spdk_mem_register,
    .unregister_memory = spdk_mem_unregister,
    .translates = translates,
    .dma_alloc = dma_alloc,
    .dma_free = spdk_dma_free,
};

}  // namespace

const Ops* real_ops() {
    return &kReal;
}

}  // namespace hcache::spdk

#endif
