// Many copies to a GPU, pinned memory and kernels by name, on a fake of the CUDA driver (tests/native/fakes). No GPU is
// touched.
#include <dlfcn.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../gpu/copies.hpp"
#include "../gpu/placing.hpp"
#include "check.hpp"

using namespace hcache::gpu;

namespace {

constexpr std::uint32_t kImage[] = {0xBA55ED50, 0};  // what the fake takes for a fat binary
constexpr std::size_t kSome = 1 << 20;

void* library = nullptr;

template <typename Function>
Function* fake(const char* name) {
    auto* const function = reinterpret_cast<Function*>(::dlsym(library, name));
    CHECK(function != nullptr);
    return function;
}

void set(const char* name, long value) {
    fake<void(const char*, long)>("fake_cuda_set")(name, value);
}

long get(const char* name) {
    return fake<long(const char*)>("fake_cuda_get")(name);
}

int run(Handle stream, int most = -1) {
    return fake<int(void*, int)>("fake_cuda_run")(stream, most);
}

template <typename Work>
std::string refusal_of(Work&& work) {
    try {
        work();
    } catch (const std::exception& error) {
        return error.what();
    }
    return "nothing was refused";
}

bool contains(const std::string& text, const char* part) {
    return text.find(part) != std::string::npos;
}

/// A GPU with some memory, a stream of somebody else's, and pinned memory of the host. All faults are off when it goes.
struct Rig {
    explicit Rig(long driver_version = 13000) {
        set("driver_version", driver_version);
        gpu = std::make_shared<Gpu>(0);
        copies = std::make_unique<Copies>(gpu);
        stream = fake<void*()>("fake_cuda_new_stream")();
        memory = gpu->allocate(kSome);
        std::mt19937 random(1);
        for (std::byte& byte : host) byte = static_cast<std::byte>(random());
        gpu->pin(host.data(), host.size());
        before = num("copies"), batches_before = num("batches");
    }
    ~Rig() {
        for (const char* name : {"delayed", "copy_error", "batch_error", "register_error", "launch_error"})
            set(name, 0);
        set("driver_version", 13000);
        run(stream);
        fake<int(void*)>("cuStreamDestroy_v2")(stream);
        gpu->unpin(host.data());
        gpu->free(memory);
        copies.reset();
        gpu.reset();
        for (const char* name : {"allocations", "streams", "contexts", "pinned", "modules"}) CHECK(get(name) == 0);
    }
    static long num(const char* name) { return get(name); }
    long single() const { return num("copies") - before; }
    long batches() const { return num("batches") - batches_before; }
    std::uint64_t at_host(std::size_t offset) const { return reinterpret_cast<std::uint64_t>(host.data()) + offset; }
    std::vector<std::byte> in_memory() {
        std::vector<std::byte> out(kSome);
        gpu->copy_out(out, memory);
        return out;
    }
    /// `count` pieces, in another order on the GPU than on the host.
    std::vector<Copy> scattered(std::size_t count, std::size_t num_bytes = 512) const {
        std::vector<Copy> made;
        for (std::size_t idx = 0; idx < count; ++idx) {
            made.push_back({memory + (idx * 7 + 3) % count * num_bytes, at_host(idx * num_bytes), num_bytes});
        }
        return made;
    }
    bool has_arrived(const std::vector<Copy>& wanted) {
        const auto now = in_memory();
        return std::ranges::all_of(wanted, [&](const Copy& copy) {
            return std::memcmp(&now[copy.to - memory], &host[copy.from - at_host(0)], copy.num_bytes) == 0;
        });
    }

    std::vector<std::byte> host = std::vector<std::byte>(kSome);
    std::shared_ptr<Gpu> gpu;
    std::unique_ptr<Copies> copies;
    Handle stream = nullptr;
    Address memory = 0;
    long before = 0, batches_before = 0;
};

void neighbours_are_one_copy() {
    const std::vector<Copy> wanted{{100, 1000, 10}, {110, 1010, 5}, {115, 1016, 4}, {119, 1020, 0},
                                   {119, 1020, 1},  {200, 1021, 1}, {201, 1022, 9}};
    const std::vector<Copy> few = merged(wanted);
    const std::vector<Copy> want{{100, 1000, 15}, {115, 1016, 5}, {200, 1021, 10}};
    CHECK(few.size() == want.size());
    for (std::size_t idx = 0; idx < want.size(); ++idx) {
        CHECK(few[idx].to == want[idx].to && few[idx].from == want[idx].from);
        CHECK(few[idx].num_bytes == want[idx].num_bytes);
    }
    CHECK(merged({}).empty());
}

void batches_go_by_the_signature_of_the_driver() {
    for (const auto& [version, how] : {std::pair(13010L, "in batches (CUDA 13)"), std::pair(13000L, "CUDA 13)"),
                                       std::pair(12090L, "in batches (CUDA 12.8)"), std::pair(12080L, "CUDA 12.8)")}) {
        Rig rig(version);
        CHECK(contains(rig.copies->how(), how));
        const auto wanted = rig.scattered(600);
        CHECK(rig.copies->run(wanted, rig.stream) == 600);
        CHECK(rig.has_arrived(wanted));
        CHECK(rig.batches() == 3 && rig.single() == 0);
        CHECK(get("largest_batch") == Copies::kMaxPerCall);
    }
    Rig rig(12060);
    CHECK(contains(rig.copies->how(), "one by one"));
    const auto wanted = rig.scattered(600);
    CHECK(rig.copies->run(wanted, rig.stream) == 600);
    CHECK(rig.has_arrived(wanted));
    CHECK(rig.batches() == 0 && rig.single() == 600);
}

void the_default_stream_takes_no_batches() {
    Rig rig;
    for (const std::uintptr_t stream : {0, 1}) {
        const auto wanted = rig.scattered(20);
        CHECK(rig.copies->run(wanted, reinterpret_cast<Handle>(stream)) == 20);
        CHECK(rig.has_arrived(wanted));
    }
    CHECK(rig.batches() == 0 && rig.single() == 40);
}

void a_run_of_neighbours_is_one_call() {
    Rig rig;
    std::vector<Copy> wanted;
    for (std::size_t idx = 0; idx < 300; ++idx) wanted.push_back({rig.memory + idx * 64, rig.at_host(idx * 64), 64});
    CHECK(rig.copies->run(wanted, rig.stream) == 1);
    CHECK(rig.has_arrived(wanted));
    CHECK(rig.batches() == 0 && rig.single() == 1);
    CHECK(rig.copies->run({}, rig.stream) == 0);
}

void what_was_pinned_in_two_pieces_is_copied_in_two() {
    Rig rig;
    rig.gpu->unpin(rig.host.data());
    rig.gpu->pin(rig.host.data(), kSome / 2);
    rig.gpu->pin(rig.host.data() + kSome / 2, kSome / 2);
    const std::vector<Copy> wanted{{rig.memory, rig.at_host(kSome / 2 - 4096), 4096},
                                   {rig.memory + 4096, rig.at_host(kSome / 2), 4096}};
    CHECK(rig.copies->run(wanted, rig.stream) == 2);
    CHECK(rig.has_arrived(wanted));
    rig.gpu->unpin(rig.host.data() + kSome / 2);
}

void sources_are_read_when_the_stream_has_come_to_them() {
    Rig rig;
    set("delayed", 1);
    const auto wanted = rig.scattered(500);
    const auto untouched = rig.in_memory();
    rig.copies->run(wanted, rig.stream);
    CHECK(rig.in_memory() == untouched);
    rig.host[0] ^= std::byte{1};  // of the first batch, and read as it is when that runs
    CHECK(run(rig.stream, 1) == 1);
    CHECK(rig.in_memory() != untouched && !rig.has_arrived(wanted));
    CHECK(run(rig.stream) == 1);
    CHECK(rig.has_arrived(wanted));
}

void refusals_are_told() {
    Rig rig;
    const auto wanted = rig.scattered(20);
    set("batch_error", 700);
    CHECK(contains(refusal_of([&] { rig.copies->run(wanted, rig.stream); }), "copying to the GPU failed"));
    set("batch_error", 0);
    CHECK(contains(rig.copies->how(), "CUDA 13"));
    auto beyond = wanted;
    beyond[7].to = rig.memory + kSome - 8;
    CHECK(contains(refusal_of([&] { rig.copies->run(beyond, rig.stream); }), "copying to the GPU failed"));
    set("copy_error", 2);
    CHECK(contains(refusal_of([&] { rig.copies->run(std::span(wanted).first(1), rig.stream); }), "OUT_OF_MEMORY"));
    set("copy_error", 0);
    set("register_error", 2);
    std::vector<std::byte> more(4096);
    CHECK(contains(refusal_of([&] { rig.gpu->pin(more.data(), more.size()); }), "cuMemHostRegister failed"));
    set("register_error", 0);
    CHECK(contains(refusal_of([&] { rig.gpu->pin(rig.host.data(), 4096); }), "cuMemHostRegister failed"));
    CHECK(contains(refusal_of([&] { rig.gpu->unpin(more.data()); }), "cuMemHostUnregister failed"));
}

void a_gpu_that_refuses_batches_is_asked_once() {
    Rig rig;
    set("batch_error", 801);
    const auto wanted = rig.scattered(300);
    CHECK(rig.copies->run(wanted, rig.stream) == 300);
    CHECK(rig.has_arrived(wanted) && rig.single() == 300);
    set("batch_error", 0);
    CHECK(contains(rig.copies->how(), "refuses batches"));
    rig.copies->run(wanted, rig.stream);
    CHECK(rig.batches() == 0 && rig.single() == 600);
}

/// Two tokens of one head of 64, in device memory; slots may be chosen.
RopeScatter two_tokens(Rig& rig) {
    std::vector<std::int64_t> numbers{5, 6, 1, 0};  // positions, slots
    rig.gpu->copy_in(rig.memory, std::as_bytes(std::span(numbers)));
    const std::vector<float> inv_freq(32, 0.5F);
    rig.gpu->copy_in(rig.memory + 256, std::as_bytes(std::span(inv_freq)));
    RopeScatter params{};
    params.positions = rig.memory;
    params.slots = rig.memory + 16;
    params.inv_freq = rig.memory + 256;
    params.rows = rig.memory + 4096;
    params.cache = rig.memory + 8192;
    params.num_tokens = 2;
    params.num_slots = 2;
    params.row_stride = 128;
    params.num_kv_heads = 1;
    params.head_size = params.rotary_dim = 64;
    params.eps = 1e-6F;
    return params;
}

void kernels_are_found_once_and_run_on_the_callers_stream() {
    Rig rig;
    Kernels kernels(rig.gpu, std::as_bytes(std::span(kImage)));
    const long launches = get("launches"), lookups = get("lookups");
    const RopeScatter params = two_tokens(rig);
    std::vector<float> rows(256);
    std::iota(rows.begin(), rows.end(), 1.0F);
    rig.gpu->copy_in(params.rows, std::as_bytes(std::span(rows)));
    set("delayed", 1);
    const auto before = rig.in_memory();
    place_rows(kernels, params, NumberKind::float32, rig.stream);
    CHECK(get("launches") == launches + 1);
    CHECK(rig.in_memory() == before);  // nothing was waited for
    CHECK(run(rig.stream) == 1);
    const auto after = rig.in_memory();
    float key, value;
    std::memcpy(&key, &after[8192], sizeof key);  // slot 0 is the second token's, at position 6
    std::memcpy(&value, &after[8192 + 256], sizeof value);
    CHECK(value == rows[128 + 64]);
    CHECK(key == rows[128] * std::cos(3.0F) + -rows[128 + 32] * std::sin(3.0F));
    place_rows(kernels, params, NumberKind::float32, nullptr);
    CHECK(get("launches") == launches + 2 && get("lookups") == lookups + 1);

    RopeScatter none = params;
    none.num_tokens = 0;
    place_rows(kernels, none, NumberKind::float32, rig.stream);
    CHECK(get("launches") == launches + 2);
    CHECK(contains(refusal_of([&] { kernels.function("hcache_nothing"); }), "looking for the kernel hcache_nothing"));
    set("launch_error", 719);
    CHECK(contains(refusal_of([&] { place_rows(kernels, params, NumberKind::float32, rig.stream); }),
                   "launching hcache_rope"));
    CHECK(contains(refusal_of([&] { Kernels other(rig.gpu, std::vector<std::byte>(16)); }),
                   "loading the kernels failed"));
}

void what_is_not_aligned_takes_the_other_kernel() {
    Rig rig;
    Kernels kernels(rig.gpu, std::as_bytes(std::span(kImage)));
    RopeScatter params = two_tokens(rig);
    params.rows += 2;  // the fake ends the program where vectors would not be aligned
    place_rows(kernels, params, NumberKind::bfloat16, rig.stream);
    params.rows += 1;
    CHECK(contains(refusal_of([&] { place_rows(kernels, params, NumberKind::bfloat16, rig.stream); }), "not aligned"));
}

void sizes_that_cannot_be_are_refused() {
    Rig rig;
    Kernels kernels(rig.gpu, std::as_bytes(std::span(kImage)));
    const RopeScatter sound = two_tokens(rig);
    const auto refused = [&](auto&& change, const char* why) {
        RopeScatter params = sound;
        change(params);
        return contains(refusal_of([&] { place_rows(kernels, params, NumberKind::float16, rig.stream); }), why);
    };
    CHECK(refused([](RopeScatter& params) { params.num_kv_heads = 0; }, "no head"));
    CHECK(refused([](RopeScatter& params) { params.rotary_dim = 31; }, "rotary_dim is odd"));
    CHECK(refused([](RopeScatter& params) { params.rotary_dim = 66; }, "beyond the head"));
    CHECK(refused([](RopeScatter& params) { params.head_size = params.rotary_dim = 1024; }, "above 512"));
    CHECK(refused([](RopeScatter& params) { params.inv_freq = 0; }, "no angles"));
    CHECK(refused([](RopeScatter& params) { params.sines = params.inv_freq; }, "without cosines"));
    CHECK(refused([](RopeScatter& params) { params.row_stride = 127; }, "rows overlap"));
    CHECK(refused([](RopeScatter& params) { params.num_tokens = std::int64_t{1} << 31; }, "more tokens"));
    CHECK(refused([](RopeScatter& params) { params.slots = 0; }, "is null"));
    CHECK(refused([](RopeScatter& params) { params.slots += 4; }, "not aligned"));
    CHECK(refused([](RopeScatter& params) { params.num_kv_heads = 1U << 31; }, "too many"));
}

}  // namespace

int main(int argc, char** argv) {
    CHECK(argc == 3);
    const std::string path = std::string(argv[2]) + "/libcuda.so.1";
    ::setenv("MII_HCACHE_CUDA_LIB", path.c_str(), 1);
    library = ::dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    CHECK(library != nullptr);
    RUN(neighbours_are_one_copy);
    RUN(batches_go_by_the_signature_of_the_driver);
    RUN(the_default_stream_takes_no_batches);
    RUN(a_run_of_neighbours_is_one_call);
    RUN(what_was_pinned_in_two_pieces_is_copied_in_two);
    RUN(sources_are_read_when_the_stream_has_come_to_them);
    RUN(refusals_are_told);
    RUN(a_gpu_that_refuses_batches_is_asked_once);
    RUN(kernels_are_found_once_and_run_on_the_callers_stream);
    RUN(what_is_not_aligned_takes_the_other_kernel);
    RUN(sizes_that_cannot_be_are_refused);
}
