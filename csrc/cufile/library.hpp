// GPUDirect Storage, found at run time (libcufile.so.0): nothing is linked against it. Prototypes and structures are
// ours, after NVIDIA's "cuFile API Reference Guide".
#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstddef>
#include <optional>
#include <string>

namespace hcache::cufile {

/// CUfileError_t: an operation's status, and the CUDA driver's behind it.
struct Status {
    int error;
    int cuda_error;
};

/// CUfileOpError: those that are told apart here. 0 is success, the others begin above `kErrorBase`.
enum Error : int {
    kErrorBase = 5000,
    kNotInitialized = 5001,
    kPlatformNotSupported = 5007,
    kIoNotSupported = 5008,
    kDeviceNotSupported = 5009,
    kNvfsDriverError = 5010,
    kCudaDriverError = 5011,
    kPointerInvalid = 5012,
    kMemoryTypeInvalid = 5013,
    kPointerRange = 5014,
    kInvalidOpenFlag = 5019,
    kDirectNotSet = 5020,
    kMemoryNotRegistered = 5024,
    kPermissionDenied = 5025,
    kAlreadyOpen = 5026,
    kIoDisabled = 5034,
    kPinningFailed = 5036,
    kNoMemory = 5043,
};

/// CUfileDescr_t of an open descriptor.
struct FileDescription {
    int type = 1;  // CU_FILE_HANDLE_TYPE_OPAQUE_FD
    union {
        int fd;
        void* other;
    } handle{};
    const void* operations = nullptr;
};

/// CUfileDrvProps_t, with room behind it for what newer libraries may add.
struct Properties {
    struct {
        unsigned major_version;
        unsigned minor_version;
        std::size_t poll_threshold_bytes;
        std::size_t max_direct_io_bytes;
        unsigned status_flags;
        unsigned control_flags;
    } nvfs;
    unsigned feature_flags;
    unsigned max_device_cache_kib;
    unsigned per_buffer_cache_kib;
    unsigned max_pinned_memory_kib;
    unsigned max_batch_io;
    unsigned max_batch_timeout_ms;
    unsigned char rest[256];
};

/// How long cuFileDriverOpen may take. It looks at the machine's PCI topology; the one of cuFile 1.20 was seen to do so
/// for ever, on a machine without a GPU.
inline constexpr std::chrono::seconds kPatience{30};

/// The functions of libcufile.so.0 that are used. $MII_HCACHE_CUFILE_LIB names another library.
struct Library {
    Status (*driver_open)();
    Status (*properties)(Properties* properties);
    Status (*handle_register)(void** handle, FileDescription* description);
    void (*handle_deregister)(void* handle);
    Status (*buffer_register)(const void* base, std::size_t num_bytes, int flags);
    Status (*buffer_deregister)(const void* base);
    ssize_t (*read)(void* handle, void* base, std::size_t num_bytes, off_t file_offset, off_t base_offset);
    ssize_t (*write)(void* handle, const void* base, std::size_t num_bytes, off_t file_offset, off_t base_offset);

    /// The library with its driver open, opened at the first call, once per process, and never closed by us: no file
    /// outlives it, and cuFile closes it itself when the process ends. Throws std::runtime_error saying why not, also
    /// when opening takes longer than `patience`; a later call waits on.
    static const Library& get(std::chrono::milliseconds patience = kPatience);
};

/// What a cuFile error is as an errno. EINVAL only where cuFile refuses how the file was opened: the engine then tries
/// the page cache's descriptor.
int errno_of(int cufile_error);

/// Null when cuFile can be used here, if only by its compatibility mode, else why not, for people. Initialises the CUDA
/// driver in this process, but makes no context.
std::optional<std::string> why_no_cufile(std::chrono::milliseconds patience = kPatience);

/// How bytes would travel, for people. Throws as `Library::get`.
std::string how_cufile_moves_bytes();

}  // namespace hcache::cufile
