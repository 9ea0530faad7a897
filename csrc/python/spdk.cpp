// NVMe controllers through SPDK. mii_hcache/storage/nvme.py is their one user.
#include <stdexcept>

#include "../spdk/queue.hpp"
#include "../tests/fake_ops.hpp"
#include "parts.hpp"
#include "py_device.hpp"

namespace hcache::python {
namespace {

constexpr const char* kNotBuilt = "the native engine was built without SPDK";

struct PyController {
    PyController(const std::string& transport_id, unsigned depth, bool hugepages, bool pci, int memory_mib,
                 bool is_fake) {
        const spdk::Ops* const ops = is_fake ? &spdk::fake::kOps : spdk::real_ops();
        if (ops == nullptr) throw std::runtime_error(kNotBuilt);
        const spdk::EnvOptions options{hugepages, pci, memory_mib};
        const py::gil_scoped_release unlocked;
        controller = std::make_shared<spdk::Controller>(*ops, options, transport_id, depth);
    }

    std::shared_ptr<PyDevice> new_device() const {
        return std::make_shared<PyDevice>([this] { return std::make_unique<spdk::SpdkQueue>(controller); });
    }
    std::unique_ptr<PyFile> open(PyDevice& device, std::uint32_t id) const {
        return std::make_unique<PyFile>(device.shared_from_this(), std::make_shared<spdk::Namespace>(controller, id));
    }
    py::dict shape(std::uint32_t id) const {
        const spdk::Namespace found(controller, id);
        return py::dict(py::arg("num_bytes") = found.num_bytes(), py::arg("sector_bytes") = found.shape().sector_bytes,
                        py::arg("max_transfer_bytes") = found.shape().max_transfer_bytes);
    }
    py::dict describe() const {
        const spdk::CtrlrShape& shape = controller->shape();
        return py::dict(py::arg("model") = shape.model, py::arg("serial") = shape.serial,
                        py::arg("firmware") = shape.firmware, py::arg("needs_translation") = shape.needs_translation,
                        py::arg("namespaces") = shape.namespace_ids);
    }

    std::shared_ptr<spdk::Controller> controller;
};

}  // namespace

void bind_spdk(py::module_& module) {
    module.def(
        "why_no_spdk",
        []() -> std::optional<std::string> {
            return spdk::real_ops() == nullptr ? std::optional<std::string>(kNotBuilt) : std::nullopt;
        },
        "None when SPDK is built in, else why not.");
    py::class_<PyController>(module, "NvmeController")
        .def(py::init<const std::string&, unsigned, bool, bool, int, bool>(), py::arg("transport_id"), py::arg("depth"),
             py::kw_only(), py::arg("hugepages") = true, py::arg("pci") = true, py::arg("memory_mib") = 0,
             py::arg("fake") = false)
        .def("new_device", &PyController::new_device)
        .def("open", &PyController::open, py::arg("device"), py::arg("namespace_id"))
        .def("shape", &PyController::shape, py::arg("namespace_id"))
        .def("describe", &PyController::describe);
}

}  // namespace hcache::python
