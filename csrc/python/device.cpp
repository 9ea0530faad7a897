// Files, batches and devices. mii_hcache/storage/uring.py is their one user.
#include "../io/device.hpp"

#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <system_error>

#include "../io/faults.hpp"
#include "../io/uring.hpp"
#include "lease.hpp"
#include "parts.hpp"

namespace hcache::python {
namespace {

using namespace std::chrono_literals;

struct PyDevice;

/// A file of a device; forgets itself.
struct PyFile {
    PyFile(std::shared_ptr<PyDevice> owner, int fd) : device(std::move(owner)) {
        try {
            file = std::make_shared<io::File>(fd);
        } catch (const std::system_error& error) {
            raise(error);
        }
    }
    ~PyFile() { close(); }
    void close();
    std::shared_ptr<PyDevice> device;
    std::shared_ptr<io::File> file;
};

struct PyBatch {
    // in this order: the transfer ends first, then the buffers go
    std::vector<Lease> leases;
    std::optional<io::Transfer> transfer;

    ~PyBatch() { close(); }
    void close() {
        {
            const py::gil_scoped_release unlocked;
            transfer.reset();
        }
        leases.clear();
    }
    void check_open() const {
        if (!transfer) throw py::value_error("the batch is closed");
    }
    std::int64_t wait(std::size_t idx) const {
        check_open();
        if (idx >= transfer->size()) throw py::index_error();
        while (true) {
            std::optional<std::int64_t> result;
            {
                const py::gil_scoped_release unlocked;
                result = transfer->wait(idx, 100ms);
            }
            if (result) return *result;
            if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        }
    }
    std::vector<std::int64_t> wait_all() const {
        check_open();
        for (bool done = false; !done;) {
            {
                const py::gil_scoped_release unlocked;
                done = transfer->wait_all(100ms);
            }
            if (!done && PyErr_CheckSignals() != 0) throw py::error_already_set();
        }
        std::vector<std::int64_t> results;
        for (std::size_t idx = 0; idx < transfer->size(); ++idx) results.push_back(*transfer->wait(idx, 0ms));
        return results;
    }
};

struct PyDevice : std::enable_shared_from_this<PyDevice> {
    explicit PyDevice(unsigned depth) {
        try {
            const py::gil_scoped_release unlocked;
            device = std::make_unique<io::Device>([this, depth]() -> std::unique_ptr<io::Queue> {
                auto ring = std::make_unique<io::UringQueue>(depth);
                return std::make_unique<io::FaultyQueue>(std::move(ring),
                                                         [this](const io::Attempt& a) { return ask(a); });
            });
        } catch (const std::system_error& error) {
            raise(error);
        }
    }
    ~PyDevice() {
        const py::gil_scoped_release unlocked;
        device.reset();
    }

    /// On the device's thread.
    std::int64_t ask(const io::Attempt& attempt) {
        if (!has_fault.load(std::memory_order_acquire)) return io::kPass;
        const py::gil_scoped_acquire locked;
        if (fault.is_none()) return io::kPass;
        try {
            const py::object verdict = fault(attempt.op == io::Op::write, attempt.offset, attempt.length);
            return verdict.is_none() ? io::kPass : verdict.cast<std::int64_t>();
        } catch (const std::exception&) {
            return -EIO;
        }
    }
    void set_fault(py::object wanted) {
        fault = std::move(wanted);
        has_fault.store(!fault.is_none(), std::memory_order_release);
    }

    std::unique_ptr<PyBatch> submit(const py::list& wanted) {
        auto batch = std::make_unique<PyBatch>();
        std::vector<io::Request> requests;
        batch->leases.reserve(wanted.size());
        requests.reserve(wanted.size());
        for (const py::handle& item : wanted) {
            const auto [is_write, file, offset, buffer] =
                item.cast<std::tuple<bool, PyFile*, std::uint64_t, py::object>>();
            if (file == nullptr || !file->file) throw py::value_error("the file is closed");
            const Lease& lease = batch->leases.emplace_back(buffer, !is_write);
            const io::Op op = is_write ? io::Op::write : io::Op::read;
            requests.push_back({op, file->file, offset, lease.data(), lease.size()});
        }
        batch->transfer.emplace(device->submit(std::move(requests)));
        return batch;
    }

    bool lend(const py::object& buffer) {
        Lease lease(buffer, true);
        bool taken = false;
        {
            const py::gil_scoped_release unlocked;
            device->run([&](io::Queue& queue) { taken = queue.lend(lease.bytes()); });
        }
        if (taken) lent.push_back(std::move(lease));
        return taken;
    }
    void take_back(const py::object& buffer) {
        std::byte* start = Lease(buffer, true).data();
        const auto found = std::find_if(lent.begin(), lent.end(), [=](const Lease& l) { return l.data() == start; });
        if (found == lent.end()) return;
        const std::span<std::byte> bytes = found->bytes();
        {
            const py::gil_scoped_release unlocked;
            device->run([&](io::Queue& queue) { queue.take_back(bytes); });
        }
        std::vector<Lease> kept;
        for (Lease& lease : lent) {
            if (lease.data() != start) kept.push_back(std::move(lease));
        }
        lent.swap(kept);
    }
    void cancel() {
        const py::gil_scoped_release unlocked;
        device->cancel();
    }
    void close() {
        const py::gil_scoped_release unlocked;
        device->close();
    }

    // in this order: the device ends before what its thread may still use
    std::vector<Lease> lent;
    py::object fault = py::none();
    std::atomic<bool> has_fault{false};
    std::unique_ptr<io::Device> device;
};

void PyFile::close() {
    if (!file) return;
    const py::gil_scoped_release unlocked;
    device->device->forget(*file);
    file.reset();
}

}  // namespace

void bind_device(py::module_& module) {
    module.attr("HOLD") = io::kHold;
    module.attr("STUCK") = io::kStuck;
    module.def("why_no_uring", &io::why_no_uring, "None when io_uring works here, else why not.");

    py::class_<PyFile>(module, "File")
        .def_property_readonly("is_direct", [](const PyFile& self) { return self.file && self.file->is_direct(); })
        .def("close", &PyFile::close);

    py::class_<PyBatch>(module, "Batch")
        .def("__len__", [](const PyBatch& self) { return self.transfer ? self.transfer->size() : 0; })
        .def("wait", &PyBatch::wait, py::arg("idx"))
        .def("wait_all", &PyBatch::wait_all)
        .def("close", &PyBatch::close);

    py::class_<PyDevice, std::shared_ptr<PyDevice>>(module, "Device")
        .def(py::init<unsigned>(), py::arg("depth"))
        .def("open", [](PyDevice& self, int fd) { return std::make_unique<PyFile>(self.shared_from_this(), fd); })
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
        .def("close", &PyDevice::close)
        .def_property("fault", [](const PyDevice& self) { return self.fault; }, &PyDevice::set_fault);
}

}  // namespace hcache::python
