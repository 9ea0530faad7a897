// Batches and devices as Python sees them, whatever queue is below.
#pragma once

#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>
#include <vector>

#include "../io/device.hpp"
#include "../io/faults.hpp"
#include "lease.hpp"

namespace hcache::python {

struct PyDevice;

/// How often whoever waits looks for Ctrl-C.
inline constexpr std::chrono::milliseconds kSignalsInterval{100};

/// A file or namespace of a device; forgets itself.
struct PyFile {
    PyFile(std::shared_ptr<PyDevice> owner, std::shared_ptr<io::Target> wanted)
        : device(std::move(owner)), target(std::move(wanted)) {}
    ~PyFile() { close(); }
    void close();
    std::shared_ptr<PyDevice> device;
    std::shared_ptr<io::Target> target;
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
                result = transfer->wait(idx, kSignalsInterval);
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
                done = transfer->wait_all(kSignalsInterval);
            }
            if (!done && PyErr_CheckSignals() != 0) throw py::error_already_set();
        }
        std::vector<std::int64_t> results;
        for (std::size_t idx = 0; idx < transfer->size(); ++idx)
            results.push_back(*transfer->wait(idx, std::chrono::milliseconds(0)));
        return results;
    }
};

struct PyDevice : std::enable_shared_from_this<PyDevice> {
    /// Throws what `make_queue` throws.
    explicit PyDevice(const io::Device::MakeQueue& make_queue) {
        const py::gil_scoped_release unlocked;
        device = std::make_unique<io::Device>([this, &make_queue]() -> std::unique_ptr<io::Queue> {
            return std::make_unique<io::FaultyQueue>(make_queue(), [this](const io::Attempt& a) { return ask(a); });
        });
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
            if (file == nullptr || !file->target) throw py::value_error("the file is closed");
            const Lease& lease = batch->leases.emplace_back(buffer, !is_write);
            const io::Op op = is_write ? io::Op::write : io::Op::read;
            requests.push_back({op, file->target, offset, lease.data(), lease.size()});
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
    /// 0 or a negative errno.
    int flush(const PyFile& file) {
        if (!file.target) throw py::value_error("the file is closed");
        const py::gil_scoped_release unlocked;
        int result = -ECANCELED;
        device->run([&](io::Queue& queue) { result = queue.flush(*file.target); });
        return result;
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

inline void PyFile::close() {
    if (!target) return;
    const py::gil_scoped_release unlocked;
    device->device->forget(*target);
    target.reset();
}

}  // namespace hcache::python
