// What nvcc made of the .cu files, on one GPU: kernels by their names.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "gpu.hpp"

namespace hcache::gpu {

/// Any thread. Errors are std::runtime_error.
class Kernels {
  public:
    /// `image`: a fat binary. Throws also when it has no code for this GPU.
    Kernels(std::shared_ptr<Gpu> gpu, std::span<const std::byte> image);
    ~Kernels();
    Kernels(const Kernels&) = delete;
    Kernels& operator=(const Kernels&) = delete;

    const std::shared_ptr<Gpu>& gpu() const { return gpu_; }
    /// Looked up once. Throws when the image has no such kernel.
    Handle function(const std::string& name);
    /// Queue one launch on `stream`, which is any of this GPU's primary context, 0 among them; waits for nothing. The
    /// kernel's arguments are copied before the return; what they point to is the caller's until it has run.
    void launch(const std::string& name, unsigned grid_x, unsigned grid_y, unsigned block_x, void** arguments,
                Handle stream);

  private:
    const std::shared_ptr<Gpu> gpu_;
    const std::vector<std::byte> image_;
    Handle module_ = nullptr;
    std::mutex lock_;
    std::map<std::string, Handle> functions_;
};

}  // namespace hcache::gpu
