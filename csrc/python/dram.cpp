// Memory for state, and copies by several threads.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "../io/copier.hpp"
#include "../io/slab.hpp"
#include "lease.hpp"
#include "parts.hpp"

namespace hcache::python {
namespace {

void copy(io::Copier& copier, const py::list& pairs) {
    std::vector<Lease> leases;
    std::vector<io::Copy> copies;
    for (const py::handle& pair : pairs) {
        const auto [target, source] = pair.cast<std::tuple<py::object, py::object>>();
        const Lease to(target, true), from(source, false);
        if (to.size() != from.size()) throw py::value_error("a copy's two sides differ in length");
        copies.push_back({to.data(), from.data(), to.size()});
        leases.emplace_back(target, true);
        leases.emplace_back(source, false);
    }
    const py::gil_scoped_release unlocked;
    copier.run(copies);
}

/// Addresses rather than buffers: asking a tensor for its buffer costs more than copying a row. The caller has checked
/// the shapes and keeps both sides alive until the return.
void scatter(io::Copier& copier, const py::list& rows) {
    std::vector<io::Copy> copies;
    copies.reserve(rows.size());
    for (const py::handle& item : rows) {
        const auto [target, target_stride, source, source_stride, num_bytes, num_runs] = item.cast<
            std::tuple<std::uintptr_t, std::ptrdiff_t, std::uintptr_t, std::ptrdiff_t, std::size_t, std::size_t>>();
        if (target == 0 || source == 0) throw py::value_error("a copy from or to nowhere");
        copies.push_back({reinterpret_cast<std::byte*>(target), reinterpret_cast<const std::byte*>(source), num_bytes,
                          num_runs, target_stride, source_stride});
    }
    const py::gil_scoped_release unlocked;
    copier.run(copies);
}

}  // namespace

void bind_dram(py::module_& module) {
    py::class_<io::Slab>(module, "Slab", py::buffer_protocol())
        .def(py::init<std::size_t>(), py::arg("num_bytes"))
        .def_buffer([](const io::Slab& self) {
            const auto bytes = self.bytes();
            return py::buffer_info(reinterpret_cast<std::uint8_t*>(bytes.data()),
                                   static_cast<py::ssize_t>(bytes.size()));
        });

    py::class_<io::Copier>(module, "Copier")
        .def(py::init<unsigned, std::size_t>(), py::arg("num_threads"),
             py::arg("bytes_per_thread") = io::kBytesPerThread, py::call_guard<py::gil_scoped_release>())
        .def("run", &copy, py::arg("pairs"))
        .def("scatter", &scatter, py::arg("rows"));
}

}  // namespace hcache::python
