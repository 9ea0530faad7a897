// Copies to a GPU, and kernels on one. Memory and streams are addresses here: nothing of them is looked at.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "../gpu/copies.hpp"
#include "../gpu/placing.hpp"
#include "lease.hpp"
#include "parts.hpp"
#include "unlocked.hpp"

namespace hcache::python {
namespace {

gpu::Handle handle_of(std::uint64_t stream) {
    return reinterpret_cast<gpu::Handle>(stream);
}

gpu::NumberKind kind_of(const std::string& dtype) {
    if (dtype == "float16") return gpu::NumberKind::float16;
    if (dtype == "bfloat16") return gpu::NumberKind::bfloat16;
    if (dtype == "float32") return gpu::NumberKind::float32;
    throw py::value_error("no kernel for " + dtype);
}

struct PyGpu {
    explicit PyGpu(int gpu_idx) {
        unlocked([&] {
            gpu = std::make_shared<gpu::Gpu>(gpu_idx);
            copies = std::make_unique<gpu::Copies>(gpu);
        });
    }
    ~PyGpu() { close(); }

    void check_open() const {
        if (!gpu) throw py::value_error("closed");
    }
    std::size_t copy_in_many(const std::vector<std::tuple<std::uint64_t, std::uint64_t, std::uint64_t>>& wanted,
                             std::uint64_t stream) {
        check_open();
        std::vector<gpu::Copy> made;
        made.reserve(wanted.size());
        for (const auto& [to, from, num_bytes] : wanted) made.push_back({to, from, num_bytes});
        return unlocked([&] { return copies->run(made, handle_of(stream)); });
    }
    void close() {
        const py::gil_scoped_release released;
        copies.reset();
        gpu.reset();
    }

    std::shared_ptr<gpu::Gpu> gpu;
    std::unique_ptr<gpu::Copies> copies;
};

struct PyKernels {
    PyKernels(const PyGpu& owner, std::string_view image) {
        owner.check_open();
        unlocked([&] { kernels = std::make_unique<gpu::Kernels>(owner.gpu, std::as_bytes(std::span(image))); });
    }
    ~PyKernels() { close(); }

    void place_rows(const std::string& dtype, std::uint64_t rows, std::int64_t row_stride, std::uint64_t cache,
                    std::int64_t num_slots, std::uint64_t positions, std::uint64_t slots, std::int64_t num_tokens,
                    std::uint64_t sines, std::uint64_t cosines, std::int64_t num_positions, std::uint64_t inv_freq,
                    std::uint32_t rotary_dim, std::uint32_t num_heads, std::uint32_t num_kv_heads,
                    std::uint32_t head_size, std::uint64_t q_gamma, std::uint64_t k_gamma, float eps,
                    std::uint64_t stream) const {
        if (!kernels) throw py::value_error("closed");
        const gpu::RopeScatter params{.rows = rows,
                                      .cache = cache,
                                      .sines = sines,
                                      .cosines = cosines,
                                      .inv_freq = inv_freq,
                                      .positions = positions,
                                      .slots = slots,
                                      .q_gamma = q_gamma,
                                      .k_gamma = k_gamma,
                                      .num_tokens = num_tokens,
                                      .num_slots = num_slots,
                                      .num_positions = num_positions,
                                      .row_stride = row_stride,
                                      .num_heads = num_heads,
                                      .num_kv_heads = num_kv_heads,
                                      .head_size = head_size,
                                      .rotary_dim = rotary_dim,
                                      .eps = eps,
                                      .unused = 0};
        const gpu::NumberKind kind = kind_of(dtype);
        unlocked([&] { gpu::place_rows(*kernels, params, kind, handle_of(stream)); });
    }
    void close() {
        const py::gil_scoped_release released;
        kernels.reset();
    }

    std::unique_ptr<gpu::Kernels> kernels;
};

}  // namespace

void bind_gpu(py::module_& module) {
    module.def("num_gpus", [] { return unlocked(&gpu::num_gpus); });

    py::class_<PyGpu>(module, "Gpu")
        .def(py::init<int>(), py::arg("gpu_idx"))
        .def_property_readonly("name",
                               [](const PyGpu& self) {
                                   self.check_open();
                                   return self.gpu->name();
                               })
        .def("how_copies_go",
             [](const PyGpu& self) {
                 self.check_open();
                 return self.copies->how();
             })
        .def("copy_in_many", &PyGpu::copy_in_many, py::arg("copies"), py::arg("stream"))
        .def("pin",
             [](const PyGpu& self, const py::object& buffer) {
                 self.check_open();
                 const Lease memory(buffer, true);
                 unlocked([&] { self.gpu->pin(memory.data(), memory.size()); });
             })
        .def("unpin",
             [](const PyGpu& self, const py::object& buffer) {
                 self.check_open();
                 const Lease memory(buffer, true);
                 unlocked([&] { self.gpu->unpin(memory.data()); });
             })
        .def("close", &PyGpu::close);

    py::class_<PyKernels>(module, "GpuKernels")
        .def(py::init<const PyGpu&, std::string_view>(), py::arg("gpu"), py::arg("image"))
        .def("place_rows", &PyKernels::place_rows, py::kw_only(), py::arg("dtype"), py::arg("rows"),
             py::arg("row_stride"), py::arg("cache"), py::arg("num_slots"), py::arg("positions"), py::arg("slots"),
             py::arg("num_tokens"), py::arg("sines"), py::arg("cosines"), py::arg("num_positions"), py::arg("inv_freq"),
             py::arg("rotary_dim"), py::arg("num_heads"), py::arg("num_kv_heads"), py::arg("head_size"),
             py::arg("q_gamma"), py::arg("k_gamma"), py::arg("eps"), py::arg("stream"))
        .def("close", &PyKernels::close);
}

}  // namespace hcache::python
