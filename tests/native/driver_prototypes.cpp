// Compiled, never run: our prototypes of the CUDA driver (csrc/gpu/driver.hpp) are those of the cuda.h that is found.
#include <cuda.h>

#include <cstddef>
#include <type_traits>

#include "../../csrc/gpu/driver.hpp"

using namespace hcache::gpu;

namespace {

template <typename Theirs, typename Ours>
constexpr bool alike = sizeof(Theirs) == sizeof(Ours) && std::is_pointer_v<Theirs> == std::is_pointer_v<Ours>;

template <typename Theirs, typename Ours>
constexpr bool same = false;
template <typename Result1, typename... Theirs, typename Result2, typename... Ours>
requires(sizeof...(Theirs) == sizeof...(Ours)) constexpr bool same<Result1 (*)(Theirs...), Result2 (*)(Ours...)> =
    sizeof(Result1) == sizeof(Result2) && (alike<Theirs, Ours> && ...);

#define CHECK_LIKE(theirs, ours) static_assert(same<decltype(&theirs), decltype(Driver::ours)>, #theirs)
CHECK_LIKE(cuInit, init);
CHECK_LIKE(cuDriverGetVersion, version);
CHECK_LIKE(cuDeviceGetCount, device_count);
CHECK_LIKE(cuDeviceGet, device_get);
CHECK_LIKE(cuDeviceGetName, device_name);
CHECK_LIKE(cuDevicePrimaryCtxRetain, context_retain);
CHECK_LIKE(cuDevicePrimaryCtxRelease_v2, context_release);
CHECK_LIKE(cuCtxSetCurrent, context_set);
CHECK_LIKE(cuCtxPushCurrent_v2, context_push);
CHECK_LIKE(cuCtxPopCurrent_v2, context_pop);
CHECK_LIKE(cuMemAlloc_v2, allocate);
CHECK_LIKE(cuMemFree_v2, free);
CHECK_LIKE(cuMemHostRegister_v2, host_register);
CHECK_LIKE(cuMemHostUnregister, host_unregister);
CHECK_LIKE(cuMemcpyHtoDAsync_v2, copy_in);
CHECK_LIKE(cuMemcpyDtoHAsync_v2, copy_out);
CHECK_LIKE(cuStreamCreate, stream_create);
CHECK_LIKE(cuStreamDestroy_v2, stream_destroy);
CHECK_LIKE(cuStreamSynchronize, stream_synchronize);
CHECK_LIKE(cuModuleLoadData, module_load);
CHECK_LIKE(cuModuleUnload, module_unload);
CHECK_LIKE(cuModuleGetFunction, module_function);
CHECK_LIKE(cuLaunchKernel, launch);
CHECK_LIKE(cuGetErrorName, error_name);
CHECK_LIKE(cuGetProcAddress_v2, address_of);

constexpr bool is_13 = CUDA_VERSION >= 13000;
static_assert(same<decltype(&cuMemcpyBatchAsync), std::conditional_t<is_13, BatchCopy13, BatchCopy12>>);
static_assert(!same<decltype(&cuMemcpyBatchAsync), std::conditional_t<is_13, BatchCopy12, BatchCopy13>>);
static_assert(sizeof(CUmemcpyAttributes) == sizeof(CopyAttributes));
static_assert(offsetof(CUmemcpyAttributes, srcLocHint) == offsetof(CopyAttributes, source_hint));
static_assert(offsetof(CUmemcpyAttributes, dstLocHint) == offsetof(CopyAttributes, target_hint));
static_assert(offsetof(CUmemcpyAttributes, flags) == offsetof(CopyAttributes, flags));
static_assert(CU_MEMCPY_SRC_ACCESS_ORDER_STREAM == kInStreamOrder);
static_assert(CUDA_ERROR_INVALID_VALUE == kInvalidValue && CUDA_ERROR_NOT_SUPPORTED == kNotSupported);
static_assert(CU_STREAM_NON_BLOCKING == 1 && CU_MEMHOSTREGISTER_PORTABLE == 1 &&
              CU_GET_PROC_ADDRESS_LEGACY_STREAM == 1);

}  // namespace
