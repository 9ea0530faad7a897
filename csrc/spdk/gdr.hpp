// GPU memory that an NVMe device writes by itself: pinned and mapped through GDRCopy, known to SPDK, proven before use.
//
//     open:   pin → map → trim to whole pages → register → every page has an address → region of the queue → read-back
//     close:  drain → out of the queue → unregister → unmap → unpin
//
// EXPERIMENTAL: run on fakes only; never on a GPU, and never on NVMe hardware. What SPDK's and GDRCopy's documentation
// and sources say it needs: an IOMMU with the device under vfio-pci, a BAR1 that covers the pinned bytes, memory of
// cudaMalloc with SYNC_MEMOPS. After a transfer the GPU sees the bytes for certain only in kernels launched later.
//
// libgdrapi.so.2 is loaded when it is asked for, and may be missing: why not is told.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "../io/device.hpp"
#include "memory.hpp"
#include "queue.hpp"

namespace hcache::spdk {

/// GPU addresses and lengths are pinned in pages of this size.
inline constexpr std::uint64_t kGpuPageBytes = 64 << 10;

/// GDRCopy's handle of a pinned range; passed by value.
struct GdrPin {
    unsigned long number;
};

/// What GDRCopy tells of a mapping, in its order.
struct GdrInfo {
    std::uint64_t first_address;
    std::uint64_t mapped_bytes;
    std::uint32_t page_bytes;
    std::uint64_t cycles;
    std::uint32_t cycles_per_ms;
    unsigned is_mapped : 1;
    unsigned is_write_combining : 1;
    int mapping_type;
};

/// The library and its driver, open.
class Gdr {
  public:
    /// Throws std::runtime_error with the reason: no library, no driver.
    explicit Gdr(const std::string& library = "libgdrapi.so.2");
    ~Gdr();
    Gdr(const Gdr&) = delete;
    Gdr& operator=(const Gdr&) = delete;
    /// `2.5`
    const std::string& version() const { return version_; }

  private:
    friend class GpuMapping;
    template <typename Function>
    void find(Function*& function, const char* name);

    void* library_;
    void* handle_ = nullptr;
    std::string version_;
    void* (*open_)() = nullptr;
    int (*close_)(void*) = nullptr;
    int (*pin_)(void*, unsigned long, std::size_t, std::uint64_t, std::uint32_t, GdrPin*) = nullptr;
    int (*unpin_)(void*, GdrPin) = nullptr;
    int (*map_)(void*, GdrPin, void**, std::size_t) = nullptr;
    int (*unmap_)(void*, GdrPin, void*, std::size_t) = nullptr;
    int (*get_info_)(void*, GdrPin, GdrInfo*) = nullptr;
    int (*copy_to_)(GdrPin, void*, const void*, std::size_t) = nullptr;
    int (*copy_from_)(GdrPin, void*, const void*, std::size_t) = nullptr;
    void (*get_version_)(int*, int*) = nullptr;
};

/// GPU memory as the CPU's bus sees it. Reading it with the CPU is slow: for checks only.
class GpuMapping {
  public:
    /// `address`: of the GPU. Whole GPU pages of `[address, address + num_bytes)` are pinned; the memory must be freed
    /// only after this. Throws std::runtime_error with the reason.
    GpuMapping(std::shared_ptr<Gdr> gdr, std::uint64_t address, std::uint64_t num_bytes);
    ~GpuMapping();
    GpuMapping(const GpuMapping&) = delete;
    GpuMapping& operator=(const GpuMapping&) = delete;

    std::span<std::byte> bytes() const { return bytes_; }
    /// The GPU's address of the first of `bytes`.
    std::uint64_t address() const { return address_; }
    /// Copy through the mapping. Throws std::runtime_error.
    void copy_to(std::byte* target, std::span<const std::byte> source) const;
    void copy_from(std::span<std::byte> target, const std::byte* source) const;

  private:
    void unpin();

    std::shared_ptr<Gdr> gdr_;
    GdrPin pin_{};
    void* start_ = nullptr;
    std::uint64_t pinned_bytes_ = 0;
    std::uint64_t address_ = 0;
    std::span<std::byte> bytes_;
};

/// GPU memory that transfers of one device may name. Its owner ends all transfers on it first.
class GpuWindow {
  public:
    /// `queue` is the device's own. `proof` is a place of the namespace with kPageBytes of known content that is not
    /// all alike (a superblock): it is read into the first page, the last, and one of every 2 MiB, over bytes that are
    /// all wrong, and read back. Blocks. Throws std::runtime_error with the reason; then nothing is left behind.
    GpuWindow(std::shared_ptr<Gdr> gdr, io::Device& device, SpdkQueue& queue, std::shared_ptr<Namespace> target,
              std::uint64_t proof, std::uint64_t address, std::uint64_t num_bytes);
    ~GpuWindow();
    GpuWindow(const GpuWindow&) = delete;
    GpuWindow& operator=(const GpuWindow&) = delete;

    /// What transfers may name: whole pages, so that either end may be missing.
    std::span<std::byte> bytes() const { return registration_.bytes(); }
    /// The GPU's address of the first of `bytes`.
    std::uint64_t address() const;

  private:
    void prove(const std::shared_ptr<Namespace>& target, std::uint64_t proof);
    std::int64_t read(const std::shared_ptr<Namespace>& target, std::uint64_t offset, std::span<std::byte> out);
    void leave();

    io::Device& device_;
    SpdkQueue& queue_;
    GpuMapping mapping_;
    Registration registration_;
};

}  // namespace hcache::spdk
