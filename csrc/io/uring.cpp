#include "uring.hpp"

#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <utility>

// Newer than the headers of some distributions; the numbers are the kernel's ABI.
#ifndef IORING_SETUP_COOP_TASKRUN
#define IORING_SETUP_COOP_TASKRUN (1U << 8)
#endif
#ifndef IORING_SETUP_SINGLE_ISSUER
#define IORING_SETUP_SINGLE_ISSUER (1U << 12)
#endif
#ifndef IORING_SETUP_DEFER_TASKRUN
#define IORING_SETUP_DEFER_TASKRUN (1U << 13)
#endif
#ifndef IORING_RSRC_REGISTER_SPARSE
#define IORING_RSRC_REGISTER_SPARSE (1U << 0)
#endif
#ifndef IORING_ASYNC_CANCEL_ANY
#define IORING_ASYNC_CANCEL_ANY (1U << 2)
#endif

namespace hcache::io {
namespace {

constexpr unsigned kNumFiles = 512;  // descriptors in the ring's table; RLIMIT_NOFILE bounds it, 1024 is usual
constexpr unsigned kNumRegions = 64;
constexpr std::size_t kMaxRegionBytes = std::size_t{1} << 30;  // the kernel's bound for one registered buffer
constexpr std::uint64_t kBell = ~std::uint64_t{0};
constexpr std::uint64_t kNobody = kBell - 1;

int enter(int fd, unsigned num_submit, unsigned num_wait, unsigned flags) {
    return static_cast<int>(::syscall(__NR_io_uring_enter, fd, num_submit, num_wait, flags, nullptr, 0));
}

int enroll(int fd, unsigned opcode, void* argument, unsigned num) {
    return static_cast<int>(::syscall(__NR_io_uring_register, fd, opcode, argument, num));
}

bool make_table(int fd, unsigned opcode, unsigned num) {
    io_uring_rsrc_register table{};
    table.nr = num;
    const unsigned sparse = IORING_RSRC_REGISTER_SPARSE;  // of the second field, which older headers call resv
    std::memcpy(reinterpret_cast<std::byte*>(&table) + sizeof table.nr, &sparse, sizeof sparse);
    return enroll(fd, opcode, &table, sizeof table) == 0;
}

File& file_of(Target& target) {
    return static_cast<File&>(target);  // a ring is given nothing else
}

unsigned load(unsigned* word) {
    return std::atomic_ref(*word).load(std::memory_order_acquire);
}
void store(unsigned* word, unsigned value) {
    std::atomic_ref(*word).store(value, std::memory_order_release);
}

}  // namespace

Descriptor::~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
}

Mapping::Mapping(int fd, std::size_t num_bytes, std::uint64_t offset)
    : data_(::mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd,
                   static_cast<off_t>(offset))),
      num_bytes_(num_bytes) {
    if (data_ == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap of a ring");
}

Mapping::~Mapping() {
    ::munmap(data_, num_bytes_);
}

Descriptor UringQueue::set_up(unsigned depth, io_uring_params& params) {
    // The cheapest way first: completions are worked off only when this ring's own thread asks for them.
    const unsigned ways[] = {IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN, IORING_SETUP_COOP_TASKRUN, 0};
    for (const unsigned flags : ways) {
        params = {};
        params.flags = flags;
        const int fd = static_cast<int>(::syscall(__NR_io_uring_setup, depth, &params));
        if (fd >= 0) return Descriptor(fd);
        if (errno != EINVAL) break;
    }
    throw std::system_error(errno, std::generic_category(), "io_uring_setup");
}

UringQueue::UringQueue(unsigned depth)
    : depth_(depth),
      ring_(set_up(depth + 2, params_)),  // the bell and a cancellation have their own places
      bell_(::eventfd(0, EFD_CLOEXEC)) {
    if (bell_.get() < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
    if (!(params_.features & IORING_FEAT_SINGLE_MMAP) || !(params_.features & IORING_FEAT_NODROP)) {
        throw std::system_error(ENOSYS, std::generic_category(), "io_uring of this kernel is too old");
    }
    if (enter(ring_.get(), 0, 0, 0) < 0) throw std::system_error(errno, std::generic_category(), "io_uring_enter");
    const std::size_t sq_bytes = params_.sq_off.array + params_.sq_entries * sizeof(unsigned);
    const std::size_t cq_bytes = params_.cq_off.cqes + params_.cq_entries * sizeof(io_uring_cqe);
    rings_ = std::make_unique<Mapping>(ring_.get(), std::max(sq_bytes, cq_bytes), IORING_OFF_SQ_RING);
    entries_ = std::make_unique<Mapping>(ring_.get(), params_.sq_entries * sizeof(io_uring_sqe), IORING_OFF_SQES);
    sq_head_ = rings_->at<unsigned>(params_.sq_off.head);
    sq_tail_ = rings_->at<unsigned>(params_.sq_off.tail);
    cq_head_ = rings_->at<unsigned>(params_.cq_off.head);
    cq_tail_ = rings_->at<unsigned>(params_.cq_off.tail);
    sq_mask_ = *rings_->at<unsigned>(params_.sq_off.ring_mask);
    cq_mask_ = *rings_->at<unsigned>(params_.cq_off.ring_mask);
    cqes_ = rings_->at<io_uring_cqe>(params_.cq_off.cqes);
    unsigned* order = rings_->at<unsigned>(params_.sq_off.array);
    for (unsigned idx = 0; idx < params_.sq_entries; ++idx) order[idx] = idx;
    if (make_table(ring_.get(), IORING_REGISTER_FILES2, kNumFiles)) {
        for (int slot = kNumFiles; slot-- > 0;) free_slots_.push_back(slot);
    }
    if (make_table(ring_.get(), IORING_REGISTER_BUFFERS2, kNumRegions)) regions_.resize(kNumRegions);
    listen();
}

UringQueue::~UringQueue() = default;

io_uring_sqe& UringQueue::next_entry() {
    // Never full: at most depth attempts, the bell and a cancellation, and the kernel takes all of them at once.
    const unsigned tail = *sq_tail_ + num_new_;
    io_uring_sqe& entry = entries_->at<io_uring_sqe>(0)[tail & sq_mask_];
    std::memset(&entry, 0, sizeof entry);
    ++num_new_;
    return entry;
}

void UringQueue::listen() {
    io_uring_sqe& entry = next_entry();
    entry.opcode = IORING_OP_READ;
    entry.fd = bell_.get();
    entry.addr = reinterpret_cast<std::uintptr_t>(&rung_);
    entry.len = sizeof rung_;
    entry.user_data = kBell;
    listening_ = true;
}

void UringQueue::enqueue(const Attempt& attempt) {
    File& file = file_of(*attempt.target);
    const bool direct = file.may_go_direct(attempt.offset, attempt.data, attempt.length);
    const int slot = slot_of(file, direct);
    const int region = region_of(attempt);
    const bool is_read = attempt.op == Op::read;
    io_uring_sqe& entry = next_entry();
    entry.opcode = region < 0 ? (is_read ? IORING_OP_READ : IORING_OP_WRITE)
                              : (is_read ? IORING_OP_READ_FIXED : IORING_OP_WRITE_FIXED);
    entry.fd = slot < 0 ? file.descriptor(direct) : slot;
    entry.flags = slot < 0 ? 0 : IOSQE_FIXED_FILE;
    entry.off = attempt.offset;
    entry.addr = reinterpret_cast<std::uintptr_t>(attempt.data);
    entry.len = attempt.length;
    if (region >= 0) entry.buf_index = static_cast<std::uint16_t>(region);
    entry.user_data = attempt.token;
}

void UringQueue::submit(bool wait) {
    if (!listening_) listen();
    store(sq_tail_, *sq_tail_ + num_new_);
    num_new_ = 0;
    while (true) {
        const unsigned left = *sq_tail_ - load(sq_head_);
        const bool ready = load(cq_tail_) != *cq_head_;
        if (left == 0 && ready) return;
        // GETEVENTS always: with deferred task work, completions appear only in a call that asks for them
        const int done = enter(ring_.get(), left, wait && !ready ? 1 : 0, IORING_ENTER_GETEVENTS);
        if (done >= 0) {
            if (*sq_tail_ == load(sq_head_)) return;
        } else if (errno == EAGAIN || errno == EBUSY) {  // no memory for requests now: let completions be reaped
            if (ready) return;
            std::this_thread::sleep_for(std::chrono::microseconds(200));
        } else if (errno != EINTR) {
            // Buffers of attempts in flight may not be let go of, so there is nothing better than to ask again.
            std::this_thread::sleep_for(std::chrono::milliseconds(5));
        }
    }
}

std::size_t UringQueue::reap(std::span<Done> out) {
    std::size_t num = 0;
    unsigned head = *cq_head_;
    for (; num < out.size() && head != load(cq_tail_); ++head) {
        const io_uring_cqe& cqe = cqes_[head & cq_mask_];
        if (cqe.user_data == kBell) {
            listening_ = false;
        } else if (cqe.user_data != kNobody) {
            out[num++] = {cqe.user_data, cqe.res};
        }
    }
    store(cq_head_, head);
    return num;
}

void UringQueue::wake() {
    const std::uint64_t one = 1;
    while (::write(bell_.get(), &one, sizeof one) < 0 && errno == EINTR) {
    }
}

void UringQueue::cancel() {
    io_uring_sqe& entry = next_entry();
    entry.opcode = IORING_OP_ASYNC_CANCEL;
    entry.fd = -1;
    entry.rw_flags = IORING_ASYNC_CANCEL_ANY;  // older kernels refuse it; then what is in flight takes its time
    entry.user_data = kNobody;
}

int UringQueue::slot_of(File& file, bool direct) {
    int& slot = file.slots[direct];
    if (slot == kUnregistered && !free_slots_.empty()) {
        int fd = file.descriptor(direct);
        io_uring_files_update update{};
        update.offset = static_cast<unsigned>(free_slots_.back());
        update.fds = reinterpret_cast<std::uintptr_t>(&fd);
        if (enroll(ring_.get(), IORING_REGISTER_FILES_UPDATE, &update, 1) == 1) {
            slot = free_slots_.back();
            free_slots_.pop_back();
        }
    }
    return slot;
}

void UringQueue::forget(Target& target) {
    for (int& slot : file_of(target).slots) {
        const int old = std::exchange(slot, kForgotten);
        if (old < 0) continue;
        int none = -1;
        io_uring_files_update update{};
        update.offset = static_cast<unsigned>(old);
        update.fds = reinterpret_cast<std::uintptr_t>(&none);
        if (enroll(ring_.get(), IORING_REGISTER_FILES_UPDATE, &update, 1) == 1) free_slots_.push_back(old);
    }
}

int UringQueue::region_of(const Attempt& attempt) const {
    for (std::size_t idx = 0; idx < regions_.size(); ++idx) {
        if (attempt.data >= regions_[idx].start && attempt.data + attempt.length <= regions_[idx].stop) {
            return static_cast<int>(idx);
        }
    }
    return -1;
}

bool UringQueue::set_region(std::size_t idx, std::span<std::byte> memory) {
    iovec piece{memory.data(), memory.size()};
    io_uring_rsrc_update2 update{};
    update.offset = static_cast<unsigned>(idx);
    update.data = reinterpret_cast<std::uintptr_t>(&piece);
    update.nr = 1;
    return enroll(ring_.get(), IORING_REGISTER_BUFFERS_UPDATE, &update, sizeof update) == 1;
}

bool UringQueue::lend(std::span<std::byte> memory) {
    if (memory.empty() || memory.size() > kMaxRegionBytes) return false;
    for (std::size_t idx = 0; idx < regions_.size(); ++idx) {
        if (regions_[idx].start != nullptr) continue;
        if (!set_region(idx, memory)) return false;
        regions_[idx] = {memory.data(), memory.data() + memory.size()};
        return true;
    }
    return false;
}

void UringQueue::take_back(std::span<std::byte> memory) {
    for (std::size_t idx = 0; idx < regions_.size(); ++idx) {
        if (regions_[idx].start == memory.data() && regions_[idx].stop == memory.data() + memory.size()) {
            set_region(idx, {});
            regions_[idx] = {};
            return;
        }
    }
}

const char* why_no_uring() {
    try {
        UringQueue probe(1);
        return nullptr;
    } catch (const std::system_error& error) {
        switch (error.code().value()) {
            case ENOSYS:
                return "this kernel has no io_uring, or hides it";
            case EPERM:
            case EACCES:
                return "io_uring is not allowed here (kernel.io_uring_disabled, or the container's seccomp profile)";
            case ENOMEM:
                return "no locked memory is left for io_uring (ulimit -l)";
            default:
                return "io_uring cannot be set up";
        }
    }
}

}  // namespace hcache::io
