// The parts of the module, one file each.
#pragma once

#include <pybind11/pybind11.h>

namespace hcache::python {

/// GPUDirect Storage, and checksums on the GPU: cufile/queue.hpp, gpu/checksum.hpp.
void bind_cufile(pybind11::module_& module);
/// Batches of reads and writes on a device: io/device.hpp.
void bind_device(pybind11::module_& module);
/// Copies to a GPU and kernels on one: gpu/copies.hpp, gpu/placing.hpp.
void bind_gpu(pybind11::module_& module);
/// NVMe namespaces without the kernel: spdk/queue.hpp.
void bind_spdk(pybind11::module_& module);
/// Memory and copies: io/slab.hpp, io/copier.hpp.
void bind_dram(pybind11::module_& module);

}  // namespace hcache::python
