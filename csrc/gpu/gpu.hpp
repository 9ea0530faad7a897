// One GPU through the CUDA driver API, found at run time (libcuda.so.1): nothing is linked against CUDA. Prototypes are
// ours, after NVIDIA's "CUDA Driver API" reference.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "crc32c.cuh"

namespace hcache::gpu {

using Result = int;
inline constexpr Result kSuccess = 0;
using Handle = void*;  // CUcontext, CUstream, CUmodule, CUfunction: all are opaque pointers
using Address = std::uint64_t;

/// The functions of libcuda.so.1 that are used. $MII_HCACHE_CUDA_LIB names another library.
struct Driver {
    Result (*init)(unsigned flags);
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

    /// Loaded and initialised at the first call, once per process. Throws std::runtime_error: no library, no driver.
    static const Driver& get();
    /// Throws std::runtime_error naming `what` unless `result` is success.
    void check(Result result, const char* what) const;
};

/// GPUs that this process sees. Throws std::runtime_error as `Driver::get`.
int num_gpus();

/// The primary context of one GPU, which is the one that frameworks use, and a stream of our own. Any thread; no method
/// leaves the calling thread with another current context than before, but `enter`. Errors are std::runtime_error.
class Gpu {
  public:
    explicit Gpu(int idx);
    ~Gpu();
    Gpu(const Gpu&) = delete;
    Gpu& operator=(const Gpu&) = delete;

    const std::string& name() const { return name_; }
    /// Make this GPU the calling thread's for good: for threads of our own.
    void enter() const;
    /// Device memory, page-aligned in practice (the driver promises 256 bytes).
    Address allocate(std::size_t num_bytes);
    /// Also ends what is still running on the GPU.
    void free(Address address);
    /// Host to device. The bytes are there when this returns, for kernels on every stream.
    void copy_in(Address to, std::span<const std::byte> from);
    /// Device to host, after what was written there before the call.
    void copy_out(std::span<std::byte> to, Address from);

  private:
    friend class Checksum;
    class Current;

    const Driver& driver_;
    int device_ = 0;
    std::string name_;
    Handle context_ = nullptr;
    Handle stream_ = nullptr;
};

/// CRC32Cs of device memory, computed there: crc32c.cuh. Any thread; calls take turns.
class Checksum {
  public:
    /// Most pieces of one launch; longer lists take several.
    static constexpr std::size_t kMaxPieces = 256;

    /// `image`: the compiled kernel, a fat binary. Throws std::runtime_error, also when it has no code for this GPU.
    Checksum(std::shared_ptr<Gpu> gpu, std::span<const std::byte> image);
    ~Checksum();
    Checksum(const Checksum&) = delete;
    Checksum& operator=(const Checksum&) = delete;

    /// Fill in each piece's `crc`. Sees what was written to the memory before the call; blocks until done.
    void run(std::span<Piece> pieces);

  private:
    void launch(std::span<Piece> pieces);

    const std::shared_ptr<Gpu> gpu_;
    const Powers powers_ = make_powers();
    const std::vector<std::byte> image_;
    std::mutex turns_;
    Handle module_ = nullptr;
    Handle function_ = nullptr;
    Address buffer_ = 0;
};

}  // namespace hcache::gpu
