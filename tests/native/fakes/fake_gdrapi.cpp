// libgdrapi for tests: a "GPU" whose addresses the CPU cannot use, and whose memory is seen through mappings only.
//
// Loaded in place of libgdrapi.so.2. The functions beginning with fake_ are for the tests.
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>

namespace {

constexpr unsigned long kFirstAddress = 0x7f0000000000;
constexpr std::size_t kPageBytes = 64 << 10;
constexpr std::size_t kMemoryBytes = 16 << 20;

struct Pin {
    unsigned long number;
};

struct Info {
    std::uint64_t first_address, mapped_bytes;
    std::uint32_t page_bytes;
    std::uint64_t cycles;
    std::uint32_t cycles_per_ms;
    unsigned is_mapped : 1;
    unsigned is_write_combining : 1;
    int mapping_type;
};

struct Range {
    unsigned long address;
    std::size_t num_bytes;
    void* mapped = nullptr;
};

struct World {
    int memory = ::memfd_create("gpu", MFD_CLOEXEC);
    std::map<unsigned long, Range> pins;
    unsigned long next = 1;
    std::string failing;
    void (*log)(const char*) = nullptr;
    int num_open = 0;
};

World& world() {
    static World all = [] {
        World made;
        if (::ftruncate(made.memory, kMemoryBytes) != 0) std::abort();
        return made;
    }();
    return all;
}

bool fails(const char* step) {
    if (world().log != nullptr) world().log(step);
    return world().failing == step;
}

void must(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "fake gdrapi: %s\n", what);
    std::abort();
}

}  // namespace

extern "C" {

unsigned long fake_gpu_address() {
    return kFirstAddress;
}
void fake_gdr_fail(const char* step) {
    world().failing = step;
}
void fake_gdr_log(void (*log)(const char*)) {
    world().log = log;
}
int fake_gdr_num_open() {
    return world().num_open + static_cast<int>(world().pins.size());
}
void fake_gpu_read(unsigned long address, void* out, std::size_t num_bytes) {
    must(::pread(world().memory, out, num_bytes, static_cast<off_t>(address - kFirstAddress)) ==
             static_cast<ssize_t>(num_bytes),
         "read outside of the memory");
}

void* gdr_open() {
    if (fails("open")) return nullptr;
    ++world().num_open;
    return &world();
}
int gdr_close(void*) {
    must(world().pins.empty(), "closed with pinned memory");
    --world().num_open;
    return 0;
}
int gdr_pin_buffer(void*, unsigned long address, std::size_t num_bytes, std::uint64_t, std::uint32_t, Pin* pin) {
    must(address % kPageBytes == 0 && num_bytes % kPageBytes == 0 && num_bytes > 0, "pinned no whole pages");
    must(address >= kFirstAddress && address + num_bytes <= kFirstAddress + kMemoryBytes, "pinned what is not there");
    if (fails("pin")) return ENOMEM;
    pin->number = world().next++;
    world().pins[pin->number] = {address, num_bytes};
    return 0;
}
int gdr_unpin_buffer(void*, Pin pin) {
    fails("unpin");
    must(world().pins.count(pin.number) == 1, "unpinned what is not pinned");
    must(world().pins[pin.number].mapped == nullptr, "unpinned while mapped");
    world().pins.erase(pin.number);
    return 0;
}
int gdr_map(void*, Pin pin, void** start, std::size_t num_bytes) {
    Range& range = world().pins.at(pin.number);
    must(num_bytes == range.num_bytes, "mapped other bytes than were pinned");
    if (fails("map")) return EAGAIN;
    *start = ::mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, world().memory,
                    static_cast<off_t>(range.address - kFirstAddress));
    must(*start != MAP_FAILED, "no mapping");
    range.mapped = *start;
    return 0;
}
int gdr_unmap(void*, Pin pin, void* start, std::size_t num_bytes) {
    fails("unmap");
    Range& range = world().pins.at(pin.number);
    must(range.mapped == start && range.num_bytes == num_bytes, "unmapped something else");
    ::munmap(start, num_bytes);
    range.mapped = nullptr;
    return 0;
}
int gdr_get_info_v2(void*, Pin pin, Info* info) {
    if (fails("info")) return EINVAL;
    const Range& range = world().pins.at(pin.number);
    *info = {};
    info->first_address = range.address + (world().failing == "shifted" ? kPageBytes : 0);
    info->mapped_bytes = range.num_bytes;
    info->page_bytes = kPageBytes;
    return 0;
}
int gdr_copy_to_mapping(Pin, void* target, const void* source, std::size_t num_bytes) {
    if (fails("copy to")) return EIO;
    std::memcpy(target, source, num_bytes);
    return 0;
}
int gdr_copy_from_mapping(Pin, void* target, const void* source, std::size_t num_bytes) {
    if (fails("copy from")) return EIO;
    std::memcpy(target, source, num_bytes);
    return 0;
}
void gdr_runtime_get_version(int* major, int* minor) {
    *major = world().failing == "version" ? 3 : 2;
    *minor = 5;
}

}  // extern "C"
