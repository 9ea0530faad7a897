#include "gdr.hpp"

#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <stdexcept>

namespace hcache::spdk {
namespace {

constexpr std::size_t kProofStride = std::size_t{2} << 20;

using Page = std::array<std::byte, kPageBytes>;

std::runtime_error failed(const std::string& what, int error) {
    return std::runtime_error(what + " (" + std::strerror(error < 0 ? -error : error) + ")");
}

/// What is on the way to the GPU by itself, checked before anything is pinned.
std::shared_ptr<Gdr> checked(std::shared_ptr<Gdr> gdr, const Namespace& target) {
    if (target.controller()->shape().needs_translation) return gdr;
    throw std::runtime_error("a socket cannot write to a GPU's memory by itself");
}

std::uint64_t first_page(std::uint64_t address) {
    return (address + kGpuPageBytes - 1) / kGpuPageBytes * kGpuPageBytes;
}

}  // namespace

template <typename Function>
void Gdr::find(Function*& function, const char* name) {
    function = reinterpret_cast<Function*>(::dlsym(library_, name));
    if (function == nullptr) {
        ::dlclose(library_);
        throw std::runtime_error(std::string("GDRCopy's library has no ") + name + ": is it older than 2.0?");
    }
}

Gdr::Gdr(const std::string& library) : library_(::dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL)) {
    if (library_ == nullptr) throw std::runtime_error(std::string("GDRCopy is not installed: ") + ::dlerror());
    find(open_, "gdr_open");
    find(close_, "gdr_close");
    find(pin_, "gdr_pin_buffer");
    find(unpin_, "gdr_unpin_buffer");
    find(map_, "gdr_map");
    find(unmap_, "gdr_unmap");
    find(get_info_, "gdr_get_info_v2");
    find(copy_to_, "gdr_copy_to_mapping");
    find(copy_from_, "gdr_copy_from_mapping");
    find(get_version_, "gdr_runtime_get_version");
    int major = 0, minor = 0;
    get_version_(&major, &minor);
    version_ = std::to_string(major) + "." + std::to_string(minor);
    if (major == 2) handle_ = open_();
    if (handle_ == nullptr) {
        ::dlclose(library_);
        throw std::runtime_error(major == 2 ? "GDRCopy has no driver to talk to: is gdrdrv loaded?"
                                            : "GDRCopy " + version_ + " is not one that this knows: 2.x is");
    }
}

Gdr::~Gdr() {
    close_(handle_);
    ::dlclose(library_);
}

GpuMapping::GpuMapping(std::shared_ptr<Gdr> gdr, std::uint64_t address, std::uint64_t num_bytes)
    : gdr_(std::move(gdr)), address_(first_page(address)) {
    const std::uint64_t stop = (address + num_bytes) / kGpuPageBytes * kGpuPageBytes;
    if (stop <= address_) throw std::runtime_error("not one whole page of 64 KiB lies in the GPU's memory");
    pinned_bytes_ = stop - address_;
    int error = gdr_->pin_(gdr_->handle_, address_, pinned_bytes_, 0, 0, &pin_);
    if (error != 0) throw failed("the GPU's memory cannot be pinned", error);
    error = gdr_->map_(gdr_->handle_, pin_, &start_, pinned_bytes_);
    if (error != 0) {
        gdr_->unpin_(gdr_->handle_, pin_);
        throw failed("the GPU's memory cannot be mapped", error);
    }
    GdrInfo info{};
    error = gdr_->get_info_(gdr_->handle_, pin_, &info);
    // the driver may have begun the mapping below what was asked for
    const bool is_sound =
        error == 0 && info.first_address <= address_ && stop <= info.first_address + info.mapped_bytes;
    if (!is_sound) {
        unpin();
        throw failed("GDRCopy's mapping is not of the memory that was asked for", error == 0 ? EINVAL : error);
    }
    bytes_ = {static_cast<std::byte*>(start_) + (address_ - info.first_address), pinned_bytes_};
}

GpuMapping::~GpuMapping() {
    unpin();
}

void GpuMapping::unpin() {
    gdr_->unmap_(gdr_->handle_, pin_, start_, pinned_bytes_);
    gdr_->unpin_(gdr_->handle_, pin_);
}

void GpuMapping::copy_to(std::byte* target, std::span<const std::byte> source) const {
    const int error = gdr_->copy_to_(pin_, target, source.data(), source.size());
    if (error != 0) throw failed("the GPU's memory cannot be written through its mapping", error);
}

void GpuMapping::copy_from(std::span<std::byte> target, const std::byte* source) const {
    const int error = gdr_->copy_from_(pin_, target.data(), source, target.size());
    if (error != 0) throw failed("the GPU's memory cannot be read through its mapping", error);
}

GpuWindow::GpuWindow(std::shared_ptr<Gdr> gdr, io::Device& device, SpdkQueue& queue, std::shared_ptr<Namespace> target,
                     std::uint64_t proof, std::uint64_t address, std::uint64_t num_bytes)
    : device_(device),
      queue_(queue),
      mapping_(checked(std::move(gdr), *target), address, num_bytes),
      registration_(target->controller()->ops(), mapping_.bytes()) {
    if (!device_.run([this](io::Queue&) { queue_.add_region(bytes()); })) {
        throw std::runtime_error("the device is closed");
    }
    try {
        prove(target, proof);
    } catch (...) {
        leave();
        throw;
    }
}

GpuWindow::~GpuWindow() {
    leave();
}

void GpuWindow::leave() {
    device_.run([this](io::Queue&) { queue_.remove_region(bytes()); });  // a closed device has drained already
}

std::uint64_t GpuWindow::address() const {
    return mapping_.address() + static_cast<std::uint64_t>(bytes().data() - mapping_.bytes().data());
}

std::int64_t GpuWindow::read(const std::shared_ptr<Namespace>& target, std::uint64_t offset, std::span<std::byte> out) {
    const io::Transfer transfer = device_.submit({{io::Op::read, target, offset, out.data(), out.size()}});
    while (!transfer.wait_all(std::chrono::seconds(1))) {
    }
    return *transfer.wait(0, std::chrono::milliseconds(0));
}

void GpuWindow::prove(const std::shared_ptr<Namespace>& target, std::uint64_t proof) {
    Page known, wrong, found;
    if (read(target, proof, known) != std::int64_t{kPageBytes}) {
        throw std::runtime_error("the namespace cannot be read");
    }
    if (std::all_of(known.begin(), known.end(), [&](std::byte byte) { return byte == known[0]; })) {
        throw std::runtime_error("the namespace has nothing to prove the GPU's memory with: is it formatted?");
    }
    std::transform(known.begin(), known.end(), wrong.begin(), [](std::byte byte) { return ~byte; });
    const std::size_t last = bytes().size() - kPageBytes;
    for (std::size_t offset = 0;; offset = std::min(offset + kProofStride, last)) {
        const auto page = bytes().subspan(offset, kPageBytes);
        mapping_.copy_to(page.data(), wrong);
        const std::int64_t result = read(target, proof, page);
        if (result != std::int64_t{kPageBytes}) {
            throw failed("the device cannot write to the GPU's memory", result < 0 ? static_cast<int>(result) : EIO);
        }
        mapping_.copy_from(found, page.data());
        if (found != known) throw std::runtime_error("what the device wrote did not arrive in the GPU's memory");
        if (offset == last) return;
    }
}

}  // namespace hcache::spdk
