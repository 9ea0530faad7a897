#include "file.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <string>
#include <system_error>

namespace hcache::io {

File::File(int fd) : fd_(::fcntl(fd, F_DUPFD_CLOEXEC, 3)) {
    if (fd_ < 0) throw std::system_error(errno, std::generic_category(), "dup");
    const int mode = ::fcntl(fd_, F_GETFL) & O_ACCMODE;
    // by number and not by name: it is the same file for certain, whoever renames things meanwhile
    const std::string self = "/proc/self/fd/" + std::to_string(fd_);
    direct_fd_ = ::open(self.c_str(), mode | O_DIRECT | O_CLOEXEC);
    direct_ok_ = direct_fd_ >= 0;
}

File::~File() {
    if (direct_fd_ >= 0) ::close(direct_fd_);
    ::close(fd_);
}

bool File::may_go_direct(std::uint64_t offset, const std::byte* data, std::uint64_t length) const {
    const std::uint64_t all = offset | length | reinterpret_cast<std::uintptr_t>(data);
    return is_direct() && all % kDirectAlign == 0;
}

}  // namespace hcache::io
