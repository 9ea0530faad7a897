// The CUDA driver API, found at run time (libcuda.so.1): nothing is linked against CUDA. Prototypes are ours, after
// NVIDIA's "CUDA Driver API" reference, and were compared with cuda.h of CUDA 12.8, 12.9, 13.0 and 13.1.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hcache::gpu {

using Result = int;
inline constexpr Result kSuccess = 0;
inline constexpr Result kInvalidValue = 1;
inline constexpr Result kNotSupported = 801;
using Handle = void*;  // CUcontext, CUstream, CUmodule, CUfunction: all are opaque pointers
using Address = std::uint64_t;

/// How a copy of a batch is done: CUmemcpyAttributes.
struct CopyAttributes {
    int source_order;
    int source_hint[2];
    int target_hint[2];
    unsigned flags;
};
static_assert(sizeof(CopyAttributes) == 24);
/// CU_MEMCPY_SRC_ACCESS_ORDER_STREAM: a source is read when the copy's turn on the stream has come, and not earlier.
inline constexpr int kInStreamOrder = 1;

/// cuMemcpyBatchAsync as CUDA 12.8 brought it, and as CUDA 13.0 changed it. The library's symbol of that name is the
/// former for ever; which one is called is therefore asked for by version (`find_batch`).
using BatchCopy12 = Result (*)(Address* to, Address* from, std::size_t* num_bytes, std::size_t count,
                               CopyAttributes* attributes, std::size_t* first_of_each, std::size_t num_attributes,
                               std::size_t* failed_idx, Handle stream);
using BatchCopy13 = Result (*)(Address* to, Address* from, std::size_t* num_bytes, std::size_t count,
                               CopyAttributes* attributes, std::size_t* first_of_each, std::size_t num_attributes,
                               Handle stream);

/// The functions of libcuda.so.1 that are used. $MII_HCACHE_CUDA_LIB names another library.
struct Driver {
    Result (*init)(unsigned flags);
    Result (*version)(int* version);
    Result (*device_count)(int* count);
    Result (*device_get)(int* device, int ordinal);
    Result (*device_name)(char* name, int num_bytes, int device);
    Result (*context_retain)(Handle* context, int device);
    Result (*context_release)(int device);
    Result (*context_set)(Handle context);
    Result (*context_push)(Handle context);
    Result (*context_pop)(Handle* context);
    Result (*allocate)(Address* address, std::size_t num_bytes);
    Result (*free)(Address address);
    Result (*host_register)(void* memory, std::size_t num_bytes, unsigned flags);
    Result (*host_unregister)(void* memory);
    Result (*copy_in)(Address to, const void* from, std::size_t num_bytes, Handle stream);
    Result (*copy_out)(void* to, Address from, std::size_t num_bytes, Handle stream);
    Result (*stream_create)(Handle* stream, unsigned flags);
    Result (*stream_destroy)(Handle stream);
    Result (*stream_synchronize)(Handle stream);
    Result (*module_load)(Handle* module, const void* image);
    Result (*module_unload)(Handle module);
    Result (*module_function)(Handle* function, Handle module, const char* name);
    Result (*launch)(Handle function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                     unsigned block_y, unsigned block_z, unsigned shared_bytes, Handle stream, void** parameters,
                     void** extra);
    Result (*error_name)(Result result, const char** name);
    /// Null before CUDA 12.
    Result (*address_of)(const char* symbol, void** found, int version, std::uint64_t flags, int* status);

    /// Loaded and initialised at the first call, once per process. Throws std::runtime_error: no library, no driver.
    static const Driver& get();
    /// Throws std::runtime_error naming `what` unless `result` is success.
    void check(Result result, const char* what) const;
    /// `symbol` with the signature that it had in CUDA `version` (13000 is 13.0); null when the driver is older than
    /// that, or has no such function.
    void* find(const char* symbol, int version) const;
};

/// GPUs that this process sees. Throws std::runtime_error as `Driver::get`.
int num_gpus();

}  // namespace hcache::gpu
