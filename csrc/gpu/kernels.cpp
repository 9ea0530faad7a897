#include "kernels.hpp"

namespace hcache::gpu {

Kernels::Kernels(std::shared_ptr<Gpu> gpu, std::span<const std::byte> image)
    : gpu_(std::move(gpu)), image_(image.begin(), image.end()) {
    const Gpu::Current current(*gpu_);
    gpu_->driver().check(gpu_->driver().module_load(&module_, image_.data()), "loading the kernels");
}

Kernels::~Kernels() {
    try {
        const Gpu::Current current(*gpu_);
        gpu_->driver().module_unload(module_);
    } catch (const std::exception&) {
        // A driver that shuts down (the process ends) refuses; there is nothing left to mend then.
    }
}

Handle Kernels::function(const std::string& name) {
    const std::scoped_lock guard(lock_);
    const auto known = functions_.find(name);
    if (known != functions_.end()) return known->second;
    const Gpu::Current current(*gpu_);
    Handle function = nullptr;
    gpu_->driver().check(gpu_->driver().module_function(&function, module_, name.c_str()),
                         ("looking for the kernel " + name).c_str());
    return functions_.emplace(name, function).first->second;
}

void Kernels::launch(const std::string& name, unsigned grid_x, unsigned grid_y, unsigned block_x, void** arguments,
                     Handle stream) {
    const Handle kernel = function(name);
    const Gpu::Current current(*gpu_);
    gpu_->driver().check(gpu_->driver().launch(kernel, grid_x, grid_y, 1, block_x, 1, 1, 0, stream, arguments, nullptr),
                         ("launching " + name).c_str());
}

}  // namespace hcache::gpu
