// Files, batches and devices. mii_hcache/storage/uring.py is their one user.
#include <system_error>

#include "../io/uring.hpp"
#include "parts.hpp"
#include "py_device.hpp"

namespace hcache::python {
namespace {

std::shared_ptr<PyDevice> new_ring(unsigned depth) {
    try {
        return std::make_shared<PyDevice>([depth] { return std::make_unique<io::UringQueue>(depth); });
    } catch (const std::system_error& error) {
        raise(error);
    }
}

std::unique_ptr<PyFile> open_file(PyDevice& device, int fd) {
    try {
        return std::make_unique<PyFile>(device.shared_from_this(), std::make_shared<io::File>(fd));
    } catch (const std::system_error& error) {
        raise(error);
    }
}

}  // namespace

void bind_device(py::module_& module) {
    module.attr("HOLD") = io::kHold;
    module.attr("STUCK") = io::kStuck;
    module.def("why_no_uring", &io::why_no_uring, "None when io_uring works here, else why not.");

    py::class_<PyFile>(module, "File")
        .def_property_readonly("is_direct", [](const PyFile& self) { return self.target && self.target->is_direct(); })
        .def("close", &PyFile::close);

    py::class_<PyBatch>(module, "Batch")
        .def("__len__", [](const PyBatch& self) { return self.transfer ? self.transfer->size() : 0; })
        .def("wait", &PyBatch::wait, py::arg("idx"))
        .def("wait_all", &PyBatch::wait_all)
        .def("close", &PyBatch::close);

    py::class_<PyDevice, std::shared_ptr<PyDevice>>(module, "Device")
        .def(py::init(&new_ring), py::arg("depth"))
        .def("open", &open_file)
        .def("submit", &PyDevice::submit, py::arg("requests"))
        .def("lend", &PyDevice::lend, py::arg("buffer"))
        .def("take_back", &PyDevice::take_back, py::arg("buffer"))
        .def("stats",
             [](const PyDevice& self) {
                 const io::DeviceStats stats = self.device->stats();
                 return py::dict(py::arg("attempts") = stats.num_attempts, py::arg("direct") = stats.num_direct,
                                 py::arg("carried_on") = stats.num_carried_on, py::arg("errors") = stats.num_errors);
             })
        .def("cancel", &PyDevice::cancel)
        .def("flush", &PyDevice::flush, py::arg("file"))
        .def("close", &PyDevice::close)
        .def_property(
            "fault", [](const PyDevice& self) { return self.fault; }, &PyDevice::set_fault);
}

}  // namespace hcache::python
