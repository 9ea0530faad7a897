// NVMe controllers through SPDK. mii_hcache/storage/nvme.py is their one user.
#include <stdexcept>

#include "../spdk/gdr.hpp"
#include "../spdk/queue.hpp"
#include "../tests/fake_ops.hpp"
#include "parts.hpp"
#include "py_device.hpp"

namespace hcache::python {
namespace {

constexpr const char* kNotBuilt = "the native engine was built without SPDK";

/// Seen by Python as a buffer, so that batches that name it keep it.
struct PyGpuWindow {
    ~PyGpuWindow() {
        const py::gil_scoped_release unlocked;
        window.reset();
    }
    std::shared_ptr<PyDevice> device;
    std::unique_ptr<spdk::GpuWindow> window;
};

struct PyController {
    PyController(const std::string& transport_id, unsigned depth, bool hugepages, bool pci, int memory_mib,
                 bool is_fake) {
        const spdk::Ops* const ops = is_fake ? &spdk::fake::kOps : spdk::real_ops();
        if (ops == nullptr) throw std::runtime_error(kNotBuilt);
        const spdk::EnvOptions options{hugepages, pci, memory_mib};
        const py::gil_scoped_release unlocked;
        controller = std::make_shared<spdk::Controller>(*ops, options, transport_id, depth);
    }

    /// The connection goes with the last device, namespace and window of it.
    void close() {
        const py::gil_scoped_release unlocked;
        controller.reset();
    }
    const std::shared_ptr<spdk::Controller>& get() const {
        if (!controller) throw py::value_error("the controller is closed");
        return controller;
    }
    std::shared_ptr<PyDevice> new_device() const {
        const auto controller = get();
        return std::make_shared<PyDevice>([&] { return std::make_unique<spdk::SpdkQueue>(controller); });
    }
    std::unique_ptr<PyFile> open(PyDevice& device, std::uint32_t id) const {
        return std::make_unique<PyFile>(device.shared_from_this(), std::make_shared<spdk::Namespace>(get(), id));
    }
    /// `proof`: offset of a block that is not all alike.
    std::unique_ptr<PyGpuWindow> map_gpu(const std::shared_ptr<PyDevice>& device, const PyFile& file,
                                         std::uint64_t proof, std::uint64_t address, std::uint64_t num_bytes,
                                         const std::string& library) const {
        auto window = std::make_unique<PyGpuWindow>();
        window->device = device;
        const auto target = std::dynamic_pointer_cast<spdk::Namespace>(file.target);
        if (!target) throw py::value_error("not a namespace, or closed");
        const py::gil_scoped_release unlocked;
        spdk::SpdkQueue* queue = nullptr;
        device->device->run([&](io::Queue& outer) {
            queue = dynamic_cast<spdk::SpdkQueue*>(&dynamic_cast<io::FaultyQueue&>(outer).inner());
        });
        if (queue == nullptr) throw std::runtime_error("the device is closed");
        window->window = std::make_unique<spdk::GpuWindow>(std::make_shared<spdk::Gdr>(library), *device->device,
                                                           *queue, target, proof, address, num_bytes);
        return window;
    }
    py::dict shape(std::uint32_t id) const {
        const spdk::Namespace found(get(), id);
        return py::dict(py::arg("num_bytes") = found.num_bytes(), py::arg("sector_bytes") = found.shape().sector_bytes,
                        py::arg("max_transfer_bytes") = found.shape().max_transfer_bytes);
    }
    py::dict describe() const {
        const spdk::CtrlrShape& shape = get()->shape();
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
    module.def(
        "why_no_gdr",
        [](const std::string& library) -> std::optional<std::string> {
            try {
                spdk::Gdr probe(library);
                return std::nullopt;
            } catch (const std::runtime_error& error) {
                return error.what();
            }
        },
        py::arg("library") = "libgdrapi.so.2", "None when GDRCopy can be used here, else why not.");
    py::class_<PyGpuWindow>(module, "GpuWindow", py::buffer_protocol())
        .def_property_readonly("address", [](const PyGpuWindow& self) { return self.window->address(); })
        .def_buffer([](const PyGpuWindow& self) {
            const auto bytes = self.window->bytes();
            return py::buffer_info(reinterpret_cast<std::uint8_t*>(bytes.data()),
                                   static_cast<py::ssize_t>(bytes.size()));
        });
    py::class_<PyController>(module, "NvmeController")
        .def(py::init<const std::string&, unsigned, bool, bool, int, bool>(), py::arg("transport_id"), py::arg("depth"),
             py::kw_only(), py::arg("hugepages") = true, py::arg("pci") = true, py::arg("memory_mib") = 0,
             py::arg("fake") = false)
        .def("new_device", &PyController::new_device)
        .def("open", &PyController::open, py::arg("device"), py::arg("namespace_id"))
        .def("map_gpu", &PyController::map_gpu, py::arg("device"), py::arg("file"), py::arg("proof"),
             py::arg("address"), py::arg("num_bytes"), py::arg("library") = "libgdrapi.so.2")
        .def("shape", &PyController::shape, py::arg("namespace_id"))
        .def("describe", &PyController::describe)
        .def("close", &PyController::close);
}

}  // namespace hcache::python
