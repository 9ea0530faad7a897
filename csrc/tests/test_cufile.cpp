// The cuFile queue under the engine, and the checksum on "device memory", on fakes of both of NVIDIA's libraries
// (tests/native/fakes). No GPU is touched.
#include <dlfcn.h>
#include <fcntl.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>

#include "../cufile/queue.hpp"
#include "../gpu/checksum.hpp"
#include "../io/device.hpp"
#include "check.hpp"

using namespace hcache;
using namespace std::chrono_literals;

namespace {

std::string folder, fakes;
void (*set_cuda)(const char*, long);
long (*get_cuda)(const char*);
void* (*shadow)(std::uint64_t, std::uint64_t);
void (*set_cufile)(const char*, long);
long (*get_cufile)(const char*);

constexpr std::uint32_t kImage[] = {0xBA55ED50, 0};  // what the fake takes for a fat binary
constexpr std::size_t kSome = 1 << 20;

bool contains(const std::optional<std::string>& text, const char* part) {
    return text && text->find(part) != std::string::npos;
}

template <typename Function>
void find(const char* library, Function*& function, const char* name) {
    void* const loaded = ::dlopen((fakes + library).c_str(), RTLD_NOW | RTLD_LOCAL);
    CHECK(loaded != nullptr);
    function = reinterpret_cast<Function*>(::dlsym(loaded, name));
    CHECK(function != nullptr);
}

void why_not_is_told_until_all_is_there() {
    ::setenv("MII_HCACHE_CUDA_LIB", "/nonexistent/libcuda.so.1", 1);
    ::setenv("MII_HCACHE_CUFILE_LIB", "/nonexistent/libcufile.so.0", 1);
    CHECK(contains(cufile::why_no_cufile(), "no GPU can be used (/nonexistent/libcuda.so.1"));
    ::setenv("MII_HCACHE_CUDA_LIB", (fakes + "libcuda.so.1").c_str(), 1);
    find("libcuda.so.1", set_cuda, "fake_cuda_set");
    find("libcuda.so.1", get_cuda, "fake_cuda_get");
    find("libcuda.so.1", shadow, "fake_cuda_shadow");
    set_cuda("init_error", 100);
    CHECK(contains(cufile::why_no_cufile(), "cuInit failed: CUDA_ERROR_NO_DEVICE (100)"));
    set_cuda("init_error", 0);
    set_cuda("gpus", 0);
    CHECK(contains(cufile::why_no_cufile(), "there is no GPU"));
    set_cuda("gpus", 1);
    CHECK(contains(cufile::why_no_cufile(), "cuFile cannot be used (/nonexistent/libcufile.so.0"));
    ::setenv("MII_HCACHE_CUFILE_LIB", (fakes + "libcuda.so.1").c_str(), 1);  // a library, but another one
    CHECK(contains(cufile::why_no_cufile(), "has no cuFileDriverOpen"));
    ::setenv("MII_HCACHE_CUFILE_LIB", (fakes + "libcufile.so.0").c_str(), 1);
    find("libcufile.so.0", set_cufile, "fake_cufile_set");
    find("libcufile.so.0", get_cufile, "fake_cufile_get");
    set_cufile("open_error", cufile::kNotInitialized);
    CHECK(contains(cufile::why_no_cufile(), "cufile.json forbids the compatibility mode"));
    set_cufile("open_error", 5033);
    CHECK(contains(cufile::why_no_cufile(), "cuFile error 5033"));
    set_cufile("open_error", 0);
    set_cufile("open_hangs", 1);
    CHECK(contains(cufile::why_no_cufile(50ms), "cuFileDriverOpen does not come back"));
    CHECK(contains(cufile::why_no_cufile(1ms), "cuFileDriverOpen does not come back"));
    set_cufile("open_hangs", 0);
    CHECK(!cufile::why_no_cufile());
    CHECK(get_cufile("opened") == 3);  // two failed; the one that hung was waited for, not begun again
}

void how_bytes_travel_is_told() {
    CHECK(contains(cufile::how_cufile_moves_bytes(), "compatibility mode"));
    set_cufile("control", 0);
    CHECK(contains(cufile::how_cufile_moves_bytes(), "forbids that"));
    set_cufile("control", 2);
    set_cufile("status", 1 << 11);
    CHECK(contains(cufile::how_cufile_moves_bytes(), "P2PDMA"));
    set_cufile("nvfs", 2);
    CHECK(contains(cufile::how_cufile_moves_bytes(), "nvidia-fs 2.17"));
    set_cufile("nvfs", 0);
    set_cufile("status", 0);
}

/// A GPU, its device, a file of noise and as much device memory. All faults are off again when it goes.
struct Rig {
    explicit Rig(unsigned depth = 8, unsigned num_threads = 4) : gpu(std::make_shared<gpu::Gpu>(0)) {
        const std::string path = folder + "/cufile-test";
        const int fd = ::open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
        CHECK(fd >= 0);
        std::mt19937 random(1);
        for (auto& byte : bytes) byte = static_cast<std::byte>(random());
        CHECK(::pwrite(fd, bytes.data(), bytes.size(), 0) == static_cast<ssize_t>(bytes.size()));
        file = std::make_shared<io::File>(fd);
        ::close(fd);
        ::unlink(path.c_str());
        memory = gpu->allocate(kSome);
        device.emplace(
            [this, depth, num_threads] { return std::make_unique<cufile::CufileQueue>(gpu, depth, num_threads); });
    }
    ~Rig() {
        for (const char* name : {"times", "most_bytes", "delay_us", "hold", "register_error", "buffer_error",
                                 "only_direct", "errno", "result"}) {
            set_cufile(name, 0);
        }
        if (file) device->forget(*file);
        file.reset();
        device.reset();
        gpu->free(memory);
        gpu.reset();
        CHECK(get_cufile("handles") == 0);
        CHECK(get_cufile("buffers") == 0);
        CHECK(get_cuda("allocations") == 0);
        CHECK(get_cuda("streams") == 0);
        CHECK(get_cuda("contexts") == 0);
    }
    std::byte* at(std::size_t offset) const { return reinterpret_cast<std::byte*>(memory + offset); }
    std::vector<std::byte> in_memory() {
        std::vector<std::byte> out(kSome);
        gpu->copy_out(out, memory);
        return out;
    }
    std::vector<io::Request> pieces(io::Op op, std::size_t num_bytes) const {
        std::vector<io::Request> requests;
        for (std::size_t start = 0; start < kSome; start += num_bytes) {
            requests.push_back({op, file, start, at(start), num_bytes});
        }
        return requests;
    }
    std::int64_t read_one(std::size_t num_bytes = 65536) {
        const io::Transfer transfer = device->submit({{io::Op::read, file, 0, at(0), num_bytes}});
        const auto result = transfer.wait(0, 60s);
        CHECK(result.has_value());
        return *result;
    }

    std::vector<std::byte> bytes = std::vector<std::byte>(kSome);
    std::shared_ptr<gpu::Gpu> gpu;
    std::shared_ptr<io::File> file;
    gpu::Address memory = 0;
    std::optional<io::Device> device;
};

void fail_transfers(long times, long result, long error = 0) {
    set_cufile("result", result);
    set_cufile("errno", error);
    set_cufile("times", times);
}

void reads_and_writes_reach_device_memory() {
    Rig rig;
    const io::Transfer reading = rig.device->submit(rig.pieces(io::Op::read, 65536));
    CHECK(reading.wait_all(60s));
    for (std::size_t idx = 0; idx < reading.size(); ++idx) CHECK(reading.wait(idx, 0ms) == 65536);
    CHECK(rig.in_memory() == rig.bytes);
    std::reverse(rig.bytes.begin(), rig.bytes.end());
    rig.gpu->copy_in(rig.memory, rig.bytes);
    CHECK(rig.device->submit(rig.pieces(io::Op::write, 131072)).wait_all(60s));
    std::vector<std::byte> out(kSome);
    CHECK(::pread(rig.file->descriptor(false), out.data(), out.size(), 0) == static_cast<ssize_t>(out.size()));
    CHECK(out == rig.bytes);
    const io::Transfer to_host = rig.device->submit({{io::Op::read, rig.file, 5, out.data(), 1000}});
    CHECK(to_host.wait(0, 60s) == 1000);
    CHECK(std::memcmp(out.data(), &rig.bytes[5], 1000) == 0);
}

void several_run_at_once() {
    Rig rig(8, 4);
    set_cufile("delay_us", 2000);
    CHECK(rig.device->submit(rig.pieces(io::Op::read, 32768)).wait_all(60s));
    CHECK(get_cufile("most_at_once") == 4);
    CHECK(rig.in_memory() == rig.bytes);
}

void short_transfers_and_the_files_end() {
    Rig rig;
    set_cufile("most_bytes", 5000);
    CHECK(rig.read_one(kSome) == kSome);
    CHECK(rig.in_memory() == rig.bytes);
    const io::Transfer over = rig.device->submit({{io::Op::read, rig.file, kSome - 100, rig.at(0), 4096}});
    CHECK(over.wait(0, 60s) == 100);
}

void errors_are_errnos() {
    Rig rig;
    fail_transfers(3, -1, EINTR);  // tried again
    CHECK(rig.read_one() == 65536);
    fail_transfers(1, -1, ENOSPC);
    CHECK(rig.read_one() == -ENOSPC);
    fail_transfers(1, -1, 0);
    CHECK(rig.read_one() == -EIO);
    fail_transfers(1, -5044);
    CHECK(rig.read_one() == -EIO);
    fail_transfers(1, -cufile::kPinningFailed);
    CHECK(rig.read_one() == -ENOMEM);
    fail_transfers(1, -cufile::kPointerRange);
    CHECK(rig.read_one() == -EFAULT);
    CHECK(rig.read_one() == 65536);
}

void a_file_that_cannot_be_registered() {
    Rig rig;
    set_cufile("register_error", cufile::kIoNotSupported);
    CHECK(rig.read_one() == -EOPNOTSUPP);
    set_cufile("register_error", 0);
    CHECK(rig.read_one() == 65536);
}

void refused_direct_io_takes_the_page_cache() {
    Rig rig;
    if (!rig.file->is_direct()) return;  // a file system without O_DIRECT: nothing to refuse
    set_cufile("only_direct", 1);
    fail_transfers(-1, -1, EINVAL);
    CHECK(rig.read_one() == 65536);
    CHECK(!rig.file->is_direct());
    CHECK(get_cufile("handles") == 2);
}

void lent_memory_is_registered_and_found() {
    Rig rig;
    const std::span<std::byte> whole(rig.at(0), kSome);
    rig.device->run([&](io::Queue& queue) {
        CHECK(queue.lend(whole));
        CHECK(!queue.lend(whole));
    });
    CHECK(get_cufile("buffers") == 1);
    CHECK(rig.device->submit(rig.pieces(io::Op::read, 65536)).wait_all(60s));
    CHECK(rig.in_memory() == rig.bytes);
    rig.device->run([&](io::Queue& queue) {
        queue.take_back(whole.first(10));  // not what was lent
        queue.take_back(whole);
        queue.take_back(whole);
    });
    CHECK(get_cufile("buffers") == 0);
    set_cufile("buffer_error", cufile::kPinningFailed);
    rig.device->run([&](io::Queue& queue) { CHECK(!queue.lend(whole)); });
    set_cufile("buffer_error", 0);
    rig.device->run([&](io::Queue& queue) { CHECK(queue.lend(whole)); });  // the queue's end lets go of it
}

void files_may_be_forgotten_while_they_are_read() {
    Rig rig(2, 2);
    set_cufile("hold", 1);
    const io::Transfer reading = rig.device->submit(rig.pieces(io::Op::read, 65536));
    while (get_cufile("flying") < 2) std::this_thread::sleep_for(1ms);
    rig.device->forget(*rig.file);
    CHECK(get_cufile("handles") == 1);
    set_cufile("hold", 0);
    CHECK(reading.wait_all(60s));
    for (std::size_t idx = 0; idx < reading.size(); ++idx) CHECK(reading.wait(idx, 0ms) == 65536);
    CHECK(rig.in_memory() == rig.bytes);
    CHECK(get_cufile("handles") == 0);
}

void closing_waits_for_what_runs_and_drops_the_rest() {
    Rig rig(6, 2);
    set_cufile("hold", 1);
    const io::Transfer reading = rig.device->submit(rig.pieces(io::Op::read, 65536));
    while (get_cufile("flying") < 2) std::this_thread::sleep_for(1ms);
    std::thread closer([&] { rig.device->close(); });
    while (!reading.wait(3, 10ms)) {  // was handed over, had not begun
    }
    CHECK(reading.wait(3, 0ms) == -ECANCELED);
    CHECK(!reading.wait(0, 10ms));
    set_cufile("hold", 0);
    closer.join();
    CHECK(reading.wait_all(0ms));
    CHECK(reading.wait(0, 0ms) == 65536);
    CHECK(reading.wait(15, 0ms) == -ECANCELED);
}

void checksums_of_device_memory() {
    Rig rig;
    rig.gpu->copy_in(rig.memory, rig.bytes);
    {
        gpu::Checksum checksum(rig.gpu, std::as_bytes(std::span(kImage)));
        std::vector<gpu::Piece> pieces{{rig.memory, 0, 0, 0}, {rig.memory, kSome, 0, 0}};
        for (std::size_t idx = 0; idx < 600; ++idx) pieces.push_back({rig.memory + idx, idx * 7, 0, 0});
        checksum.run(pieces);
        CHECK(get_cuda("launches") == 3);
        CHECK(pieces[0].crc == 0);
        for (const gpu::Piece& piece : pieces) {
            std::uint32_t crc = 0xFFFFFFFF;
            for (std::size_t idx = 0; idx < piece.num_bytes; ++idx) {
                crc ^= static_cast<std::uint32_t>(rig.bytes[piece.address - rig.memory + idx]);
                for (int bit = 0; bit < 8; ++bit) crc = (crc & 1) != 0 ? (crc >> 1) ^ gpu::kPolynomial : crc >> 1;
            }
            CHECK(piece.crc == ~crc);
        }
        checksum.run({});
        set_cuda("launch_error", 719);
        try {
            checksum.run(pieces);
            CHECK(!"a launch that fails is told of");
        } catch (const std::runtime_error& error) {
            CHECK(contains(std::string(error.what()), "launching hcache_crc32c failed"));
        }
        set_cuda("launch_error", 0);
    }
    CHECK(get_cuda("modules") == 0);
    try {
        const std::byte nonsense[16] = {};
        gpu::Checksum checksum(rig.gpu, nonsense);
        CHECK(!"an image that is none is told of");
    } catch (const std::runtime_error& error) {
        CHECK(contains(std::string(error.what()), "loading the kernels failed"));
    }
}

void a_gpu_that_is_not_there() {
    try {
        gpu::Gpu second(1);
        CHECK(!"there is one GPU");
    } catch (const std::runtime_error& error) {
        CHECK(contains(std::string(error.what()), "cuDeviceGet failed"));
    }
}

}  // namespace

int main(int argc, char** argv) {
    CHECK(argc == 3);
    folder = argv[1];
    fakes = std::string(argv[2]) + "/";
    RUN(why_not_is_told_until_all_is_there);
    RUN(how_bytes_travel_is_told);
    RUN(reads_and_writes_reach_device_memory);
    RUN(several_run_at_once);
    RUN(short_transfers_and_the_files_end);
    RUN(errors_are_errnos);
    RUN(a_file_that_cannot_be_registered);
    RUN(refused_direct_io_takes_the_page_cache);
    RUN(lent_memory_is_registered_and_found);
    RUN(files_may_be_forgotten_while_they_are_read);
    RUN(closing_waits_for_what_runs_and_drops_the_rest);
    RUN(checksums_of_device_memory);
    RUN(a_gpu_that_is_not_there);
}
