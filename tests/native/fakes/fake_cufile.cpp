// A libcufile.so.0 for tests: as much of cuFile as csrc/cufile uses, on the memory of fake_cuda.cpp, with faults. What
// would be undefined with the real library aborts: a handle let go of while it is read, after its descriptor was
// closed, or twice; memory freed while it is registered.
//
//   fake_cufile_set(name, value)   open_hangs: cuFileDriverOpen does not return while it is 1
//                                  open_error, register_error, buffer_error: cuFile's number of the error
//                                  result, errno, times: the next `times` (-1: all) transfers return `result`, with
//                                  errno only_direct: the above for files opened with O_DIRECT alone most_bytes:
//                                  transfers are cut to so many; delay_us; hold: transfers wait while it is 1 flip_at:
//                                  the byte of files at this offset (-1: none) is read wrong nvfs, status, control:
//                                  what cuFileDriverGetProperties says
//   fake_cufile_get(name)          handles, buffers, flying: how many there are; reads, writes, opened: how many were;
//                                  most_at_once
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>

extern "C" {
void* fake_cuda_context();
int fake_cuda_is_device(std::uint64_t address);
void* fake_cuda_shadow(std::uint64_t address, std::uint64_t num_bytes);
}

namespace {

struct Status {
    int error;
    int cuda_error;
};

struct Description {
    int type;
    union {
        int fd;
        void* other;
    } handle;
    const void* operations;
};

struct Properties {
    unsigned major_version, minor_version;
    std::size_t poll_threshold, max_direct;
    unsigned status, control;
    unsigned rest[6];
};

struct File {
    int fd;
    int own_fd;  // through the page cache, so that any address will do
    bool is_direct;
    unsigned num_flying;
};

std::mutex lock;
std::map<std::string, long> settings{{"flip_at", -1}, {"control", 2}};
std::map<std::string, long> counts;
std::set<File*> files;
std::map<const void*, std::size_t> buffers;
bool is_open = false;

[[noreturn]] void misuse(const char* what) {
    std::fprintf(stderr, "fake libcufile: %s\n", what);
    std::abort();
}

Status failed_as(const char* name) {
    return {static_cast<int>(settings[name]), 0};
}

long setting(const char* name) {
    const std::scoped_lock guard(lock);
    return settings[name];
}

ssize_t transfer(void* handle, char* base, std::size_t num_bytes, off_t file_offset, off_t base_offset, bool is_read) {
    auto* const file = static_cast<File*>(handle);
    long result = 1, error = 0, flip_at = -1;
    {
        const std::scoped_lock guard(lock);
        if (!is_open || files.count(file) == 0) misuse("a transfer on a file that is not registered");
        if (fake_cuda_context() == nullptr) return -5047;
        ++counts[is_read ? "reads" : "writes"];
        counts["flying"] += 1;
        counts["most_at_once"] = std::max(counts["most_at_once"], counts["flying"]);
        ++file->num_flying;
        if (settings["times"] != 0 && (settings["only_direct"] == 0 || file->is_direct)) {
            settings["times"] -= settings["times"] > 0;
            result = settings["result"];
            error = settings["errno"];
        }
        if (settings["most_bytes"] > 0)
            num_bytes = std::min(num_bytes, static_cast<std::size_t>(settings["most_bytes"]));
        flip_at = settings["flip_at"];
    }
    std::this_thread::sleep_for(std::chrono::microseconds(setting("delay_us")));
    while (setting("hold") != 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    ssize_t moved = result;
    if (result > 0) {
        char* data = base + base_offset;
        const auto address = reinterpret_cast<std::uint64_t>(data);
        if (fake_cuda_is_device(address) != 0) data = static_cast<char*>(fake_cuda_shadow(address, num_bytes));
        if (data == nullptr) misuse("a transfer to memory that is freed or was never there");
        moved = is_read ? ::pread(file->own_fd, data, num_bytes, file_offset)
                        : ::pwrite(file->own_fd, data, num_bytes, file_offset);
        error = errno;
        if (is_read && flip_at >= file_offset && flip_at < file_offset + moved) data[flip_at - file_offset] ^= 0x10;
    }
    const std::scoped_lock guard(lock);
    --file->num_flying;
    --counts["flying"];
    errno = static_cast<int>(error);
    return moved;
}

}  // namespace

extern "C" {

void fake_cufile_set(const char* name, long value) {
    const std::scoped_lock guard(lock);
    settings[name] = value;
}

long fake_cufile_get(const char* name) {
    const std::scoped_lock guard(lock);
    return counts[name];
}

Status cuFileDriverOpen() {
    while (setting("open_hangs") != 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    const std::scoped_lock guard(lock);
    const Status status = failed_as("open_error");
    is_open = is_open || status.error == 0;
    ++counts["opened"];
    return status;
}

Status cuFileDriverGetProperties(Properties* properties) {
    const std::scoped_lock guard(lock);
    properties->major_version = static_cast<unsigned>(settings["nvfs"]);
    properties->minor_version = 17;
    properties->status = static_cast<unsigned>(settings["status"]);
    properties->control = static_cast<unsigned>(settings["control"]);
    return {0, 0};
}

Status cuFileHandleRegister(void** handle, Description* description) {
    const std::scoped_lock guard(lock);
    if (!is_open) return {5001, 0};
    if (settings["register_error"] != 0) return failed_as("register_error");
    const int fd = description->handle.fd;
    struct stat found{};
    if (description->type != 1 || ::fstat(fd, &found) != 0) return {5022, 0};
    if (!S_ISREG(found.st_mode)) return {5018, 0};
    for (const File* const other : files) {
        if (other->fd == fd) return {5028, 0};
    }
    const std::string self = "/proc/self/fd/" + std::to_string(fd);
    const int flags = ::fcntl(fd, F_GETFL);
    auto* const file = new File{fd, ::open(self.c_str(), (flags & O_ACCMODE) | O_CLOEXEC), (flags & O_DIRECT) != 0, 0};
    files.insert(file);
    ++counts["handles"];
    *handle = file;
    return {0, 0};
}

void cuFileHandleDeregister(void* handle) {
    const std::scoped_lock guard(lock);
    auto* const file = static_cast<File*>(handle);
    if (files.erase(file) == 0) misuse("a file is let go of twice, or was never registered");
    if (file->num_flying != 0) misuse("a file is let go of while it is read or written");
    if (::fcntl(file->fd, F_GETFD) < 0) misuse("a file is let go of after its descriptor was closed");
    ::close(file->own_fd);
    delete file;
    --counts["handles"];
}

Status cuFileBufRegister(const void* base, std::size_t num_bytes, int) {
    const std::scoped_lock guard(lock);
    if (fake_cuda_context() == nullptr) return {5047, 0};
    if (settings["buffer_error"] != 0) return failed_as("buffer_error");
    const auto address = reinterpret_cast<std::uint64_t>(base);
    if (fake_cuda_is_device(address) != 0 && fake_cuda_shadow(address, num_bytes) == nullptr) return {5014, 0};
    if (!buffers.emplace(base, num_bytes).second) return {5023, 0};
    ++counts["buffers"];
    return {0, 0};
}

Status cuFileBufDeregister(const void* base) {
    const std::scoped_lock guard(lock);
    const auto found = buffers.find(base);
    if (found == buffers.end()) misuse("memory is let go of that was not registered");
    const auto address = reinterpret_cast<std::uint64_t>(base);
    if (fake_cuda_is_device(address) != 0 && fake_cuda_shadow(address, found->second) == nullptr) {
        misuse("memory was freed while it was registered");
    }
    buffers.erase(found);
    --counts["buffers"];
    return {0, 0};
}

ssize_t cuFileRead(void* handle, void* base, std::size_t num_bytes, off_t file_offset, off_t base_offset) {
    return transfer(handle, static_cast<char*>(base), num_bytes, file_offset, base_offset, true);
}

ssize_t cuFileWrite(void* handle, const void* base, std::size_t num_bytes, off_t file_offset, off_t base_offset) {
    return transfer(handle, const_cast<char*>(static_cast<const char*>(base)), num_bytes, file_offset, base_offset,
                    false);
}

}  // extern "C"
