// cuFile and the checksum on the GPU. mii_hcache/storage/cufile.py is their one user. Device memory is an address here:
// nothing of it is looked at.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <string_view>
#include <system_error>
#include <tuple>
#include <vector>

#include "../cufile/library.hpp"
#include "../cufile/queue.hpp"
#include "../gpu/checksum.hpp"
#include "../io/device.hpp"
#include "lease.hpp"
#include "parts.hpp"
#include "unlocked.hpp"

namespace hcache::python {
namespace {

using namespace std::chrono_literals;

std::byte* at(std::uint64_t address) {
    return reinterpret_cast<std::byte*>(address);
}

struct PyCufile;

/// A file that cuFile is told of when it is first read; forgets itself.
struct PyCufileFile {
    PyCufileFile(std::shared_ptr<PyCufile> owner, int fd)
        : cufile(std::move(owner)), file(unlocked([&] { return std::make_shared<io::File>(fd); })) {}
    ~PyCufileFile() { close(); }
    void close();

    std::shared_ptr<PyCufile> cufile;
    std::shared_ptr<io::File> file;
};

/// Results are waited for as those of `Batch`, with signals in between.
struct PyCufileBatch {
    std::optional<io::Transfer> transfer;

    ~PyCufileBatch() { close(); }
    void close() {
        const py::gil_scoped_release released;
        transfer.reset();
    }
    std::int64_t wait(std::size_t idx) const {
        if (!transfer) throw py::value_error("the batch is closed");
        if (idx >= transfer->size()) throw py::index_error();
        while (true) {
            const auto result = unlocked([&] { return transfer->wait(idx, 100ms); });
            if (result) return *result;
            if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        }
    }
};

struct PyCufile : std::enable_shared_from_this<PyCufile> {
    PyCufile(int gpu_idx, std::string_view kernel, unsigned depth, unsigned num_threads) {
        unlocked([&] {
            gpu = std::make_shared<gpu::Gpu>(gpu_idx);
            checksum = std::make_unique<gpu::Checksum>(gpu, std::as_bytes(std::span(kernel)));
            device = std::make_unique<io::Device>(
                [&] { return std::make_unique<cufile::CufileQueue>(gpu, depth, num_threads); });
        });
    }
    ~PyCufile() { close(); }

    void check_open() const {
        if (!device) throw py::value_error("closed");
    }
    std::unique_ptr<PyCufileBatch> submit(const py::list& wanted) {
        check_open();
        std::vector<io::Request> requests;
        requests.reserve(wanted.size());
        for (const py::handle& item : wanted) {
            const auto [is_write, file, offset, address, num_bytes] =
                item.cast<std::tuple<bool, PyCufileFile*, std::uint64_t, std::uint64_t, std::uint64_t>>();
            if (file == nullptr || !file->file) throw py::value_error("the file is closed");
            requests.push_back({is_write ? io::Op::write : io::Op::read, file->file, offset, at(address), num_bytes});
        }
        auto batch = std::make_unique<PyCufileBatch>();
        batch->transfer.emplace(device->submit(std::move(requests)));
        return batch;
    }
    bool lend(std::uint64_t address, std::size_t num_bytes) {
        check_open();
        return unlocked([&] {
            bool taken = false;
            device->run([&](io::Queue& queue) { taken = queue.lend({at(address), num_bytes}); });
            return taken;
        });
    }
    void take_back(std::uint64_t address, std::size_t num_bytes) {
        check_open();
        unlocked([&] { device->run([&](io::Queue& queue) { queue.take_back({at(address), num_bytes}); }); });
    }
    std::vector<std::uint32_t> crc32c(const std::vector<std::tuple<std::uint64_t, std::uint64_t>>& wanted) {
        check_open();
        std::vector<gpu::Piece> pieces;
        for (const auto& [address, num_bytes] : wanted) pieces.push_back({address, num_bytes, 0, 0});
        unlocked([&] { checksum->run(pieces); });
        std::vector<std::uint32_t> crcs;
        for (const gpu::Piece& piece : pieces) crcs.push_back(piece.crc);
        return crcs;
    }
    void copy_in(std::uint64_t address, const py::object& buffer) {
        check_open();
        const Lease from(buffer, false);
        unlocked([&] { gpu->copy_in(address, from.bytes()); });
    }
    void copy_out(const py::object& buffer, std::uint64_t address) {
        check_open();
        const Lease to(buffer, true);
        unlocked([&] { gpu->copy_out(to.bytes(), address); });
    }
    void close() {
        const py::gil_scoped_release released;
        device.reset();
        checksum.reset();
        gpu.reset();
    }

    std::shared_ptr<gpu::Gpu> gpu;
    std::unique_ptr<gpu::Checksum> checksum;
    std::unique_ptr<io::Device> device;
};

void PyCufileFile::close() {
    if (!file) return;
    const py::gil_scoped_release released;
    if (cufile->device) cufile->device->forget(*file);
    file.reset();
}

}  // namespace

void bind_cufile(py::module_& module) {
    module.def("why_no_cufile", [] { return unlocked([] { return cufile::why_no_cufile(); }); });
    module.def("how_cufile_moves_bytes", [] { return unlocked(&cufile::how_cufile_moves_bytes); });

    py::class_<PyCufileFile>(module, "CufileFile").def("close", &PyCufileFile::close);

    py::class_<PyCufileBatch>(module, "CufileBatch")
        .def("wait", &PyCufileBatch::wait, py::arg("idx"))
        .def("close", &PyCufileBatch::close);

    py::class_<PyCufile, std::shared_ptr<PyCufile>>(module, "Cufile")
        .def(py::init<int, std::string_view, unsigned, unsigned>(), py::arg("gpu_idx"), py::arg("kernel"),
             py::arg("depth"), py::arg("num_threads"))
        .def_property_readonly("gpu_name",
                               [](const PyCufile& self) {
                                   self.check_open();
                                   return self.gpu->name();
                               })
        .def("open",
             [](PyCufile& self, int fd) {
                 self.check_open();
                 return std::make_unique<PyCufileFile>(self.shared_from_this(), fd);
             })
        .def("submit", &PyCufile::submit, py::arg("requests"))
        .def("lend", &PyCufile::lend, py::arg("address"), py::arg("num_bytes"))
        .def("take_back", &PyCufile::take_back, py::arg("address"), py::arg("num_bytes"))
        .def("crc32c", &PyCufile::crc32c, py::arg("pieces"))
        .def("allocate",
             [](PyCufile& self, std::size_t num_bytes) {
                 self.check_open();
                 return unlocked([&] { return self.gpu->allocate(num_bytes); });
             })
        .def("free",
             [](PyCufile& self, std::uint64_t address) {
                 self.check_open();
                 unlocked([&] { self.gpu->free(address); });
             })
        .def("copy_in", &PyCufile::copy_in, py::arg("address"), py::arg("buffer"))
        .def("copy_out", &PyCufile::copy_out, py::arg("buffer"), py::arg("address"))
        .def("close", &PyCufile::close);
}

}  // namespace hcache::python
