// Python's view of the native engine: buffers, numbers and nothing else. csrc/python has a file for each part.
#include <pybind11/pybind11.h>

#include "python/parts.hpp"

PYBIND11_MODULE(_io, module) {
    module.doc() = "The native I/O engine (csrc).";
    module.attr("ABI") = 5;
    hcache::python::bind_cufile(module);
    hcache::python::bind_device(module);
    hcache::python::bind_dram(module);
    hcache::python::bind_gpu(module);
    hcache::python::bind_spdk(module);
}
