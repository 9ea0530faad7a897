#include "queue.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <new>
#include <stdexcept>
#include <thread>
#include <utility>

namespace hcache::spdk {
namespace {

using namespace std::chrono_literals;

constexpr auto kAdminInterval = 100ms;
constexpr auto kQpairInterval = 1s;
constexpr auto kCancelGrace = 200ms;
constexpr auto kFlushDeadline = 30s;
constexpr unsigned kSpins = 2000;  // before others on this core are let on

bool lies_in(std::span<std::byte> region, const std::byte* data, std::size_t num_bytes) {
    return data >= region.data() && data + num_bytes <= region.data() + region.size();
}

/// A command that is waited for where it is issued.
struct Waited : Command {
    bool is_done = false;
    int error = 0;
};

void on_waited(Command& command, int error) {
    auto& waited = static_cast<Waited&>(command);
    waited.error = error;
    waited.is_done = true;
}

}  // namespace

SpdkQueue::SpdkQueue(std::shared_ptr<Controller> controller)
    : controller_(std::move(controller)), ops_(controller_->ops()), flights_(controller_->depth()) {
    for (Flight& flight : flights_) {
        flight.done = on_done;
        flight.queue = this;
        free_.push_back(&flight);
    }
    qpair_ = ops_.alloc_qpair(controller_->get(), depth());
    if (qpair_ == nullptr) throw std::runtime_error("the NVMe controller gives out no queue");
}

SpdkQueue::~SpdkQueue() {
    if (qpair_ != nullptr) ops_.free_qpair(qpair_);
}

void SpdkQueue::enqueue(const io::Attempt& attempt) {
    const auto& target = static_cast<const Namespace&>(*attempt.target);  // this queue is given nothing else
    const std::uint64_t sector_bytes = target.shape().sector_bytes;
    if (attempt.offset % sector_bytes != 0 || attempt.length % sector_bytes != 0) {
        ended_.push_back({attempt.token, -EINVAL});
        return;
    }
    if (attempt.offset >= target.num_bytes()) {
        ended_.push_back({attempt.token, attempt.op == io::Op::read ? 0 : -ENOSPC});
        return;
    }
    Flight& flight = *free_.back();
    free_.pop_back();
    flight.attempt = attempt;
    const std::uint64_t most = std::min<std::uint64_t>(kMaxAttemptBytes, target.num_bytes() - attempt.offset);
    flight.attempt.length = static_cast<std::uint32_t>(std::min<std::uint64_t>(attempt.length, most));
    waiting_.push_back(&flight);
}

void SpdkQueue::submit(bool wait) {
    unsigned num_spins = 0;
    while (true) {
        start_waiting();
        poll();
        start_waiting();
        if (!ended_.empty() || !wait || rung_.exchange(false)) return;
        if (num_flying_ == 0 && waiting_.empty()) {
            sleep();
        } else if (++num_spins > kSpins) {
            std::this_thread::yield();
        }
    }
}

std::size_t SpdkQueue::reap(std::span<io::Done> out) {
    std::size_t num = 0;
    for (; num < out.size() && !ended_.empty(); ended_.pop_front()) out[num++] = ended_.front();
    return num;
}

void SpdkQueue::wake() {
    const std::scoped_lock guard(lock_);
    rung_ = true;
    bell_.notify_one();
}

void SpdkQueue::sleep() {
    std::unique_lock guard(lock_);
    bell_.wait_for(guard, kAdminInterval, [&] { return rung_.load(); });
}

void SpdkQueue::cancel() {
    cancel_at_ = std::min(cancel_at_, Clock::now() + kCancelGrace);
    for (Flight& flight : flights_) flight.cancelled = flight.flying;
    for (Flight* flight : std::exchange(waiting_, {})) end(*flight, -ECANCELED);
}

void SpdkQueue::poll() {
    if (qpair_ != nullptr && ops_.poll(qpair_) < 0) drop_qpair();
    const auto now = Clock::now();
    if (now >= next_admin_at_) {
        ops_.poll_admin(controller_->get());
        next_admin_at_ = now + kAdminInterval;
    }
    if (now < cancel_at_) return;
    if (std::any_of(flights_.begin(), flights_.end(), [](const Flight& flight) { return flight.cancelled; })) {
        drop_qpair();
    }
    cancel_at_ = Clock::time_point::max();
}

void SpdkQueue::drop_qpair() {
    if (qpair_ == nullptr) return;
    next_qpair_at_ = Clock::now() + kQpairInterval;
    ops_.free_qpair(std::exchange(qpair_, nullptr));
    for (Flight& flight : flights_) {  // of a device that is gone nothing more is heard
        if (flight.flying) on_done(flight, -EIO);
    }
}

bool SpdkQueue::has_qpair() {
    if (qpair_ != nullptr) return true;
    const auto now = Clock::now();
    if (now < next_qpair_at_) return false;
    qpair_ = ops_.alloc_qpair(controller_->get(), depth());
    if (qpair_ == nullptr && ops_.reset(controller_->get()) == 0) {
        qpair_ = ops_.alloc_qpair(controller_->get(), depth());  // a target that was started anew knows us no more
    }
    next_qpair_at_ = Clock::now() + kQpairInterval;
    return qpair_ != nullptr;
}

void SpdkQueue::start_waiting() {
    while (!waiting_.empty() && start(*waiting_.front())) waiting_.pop_front();
}

/// False when it has to wait for others to end.
bool SpdkQueue::start(Flight& flight) {
    if (!has_qpair()) {
        end(flight, -ENODEV);
        return true;
    }
    std::byte* data = flight.attempt.data;
    if (!reaches(flight.attempt)) {
        if (flight.bounce == nullptr && !fill_bounce(flight)) {
            if (num_flying_ > 0) return false;
            end(flight, -ENOMEM);
            return true;
        }
        data = flight.bounce->data();
    }
    const int error = hand_over(flight, data);
    if (error == -ENOMEM && num_flying_ > 0) return false;
    if (error != 0) {
        end(flight, error);
        if (error == -ENXIO) drop_qpair();
        return true;
    }
    num_bounced_.fetch_add(flight.bounce != nullptr, std::memory_order_relaxed);
    return true;
}

int SpdkQueue::hand_over(Flight& flight, std::byte* data) {
    const io::Attempt& attempt = flight.attempt;
    const auto& target = static_cast<const Namespace&>(*attempt.target);
    const std::uint64_t lba = attempt.offset / target.shape().sector_bytes;
    const std::uint32_t num_sectors = attempt.length / target.shape().sector_bytes;
    flight.flying = true;
    ++num_flying_;
    const int error = attempt.op == io::Op::read ? ops_.read(target.get(), qpair_, data, lba, num_sectors, flight)
                                                 : ops_.write(target.get(), qpair_, data, lba, num_sectors, flight);
    if (error != 0) {
        flight.flying = false;
        --num_flying_;
    }
    return error;
}

void SpdkQueue::on_done(Command& command, int error) {
    auto& flight = static_cast<Flight&>(command);
    SpdkQueue& queue = *flight.queue;
    flight.flying = false;
    --queue.num_flying_;
    if (error == 0 && flight.bounce != nullptr && flight.attempt.op == io::Op::read) {
        std::memcpy(flight.attempt.data, flight.bounce->data(), flight.attempt.length);
    }
    const bool is_cancelled = std::exchange(flight.cancelled, false) && Clock::now() >= queue.cancel_at_;
    const std::int64_t failure = is_cancelled ? -ECANCELED : error;
    queue.end(flight, error == 0 ? std::int64_t{flight.attempt.length} : failure);
}

void SpdkQueue::end(Flight& flight, std::int64_t result) {
    if (flight.bounce != nullptr) free_bounces_.push_back(std::exchange(flight.bounce, nullptr));
    ended_.push_back({flight.attempt.token, result});
    free_.push_back(&flight);
}

bool SpdkQueue::reaches(const io::Attempt& attempt) const {
    for (const auto region : regions_) {
        if (!lies_in(region, attempt.data, attempt.length)) continue;
        return reinterpret_cast<std::uintptr_t>(attempt.data) % 4 == 0;  // what NVMe asks of addresses
    }
    return !controller_->shape().needs_translation;
}

/// False when SPDK has no memory left for one more.
bool SpdkQueue::fill_bounce(Flight& flight) {
    if (free_bounces_.empty()) {
        try {
            bounces_.push_back(std::make_unique<DmaBuffer>(ops_, kBounceBytes));
        } catch (const std::bad_alloc&) {
            return false;
        }
        free_bounces_.push_back(bounces_.back().get());
    }
    flight.bounce = free_bounces_.back();
    free_bounces_.pop_back();
    flight.attempt.length = std::min(flight.attempt.length, kBounceBytes);
    if (flight.attempt.op == io::Op::write) {
        std::memcpy(flight.bounce->data(), flight.attempt.data, flight.attempt.length);
    }
    return true;
}

int SpdkQueue::flush(io::Target& target) {
    Waited waited;
    waited.done = on_waited;
    const auto deadline = Clock::now() + kFlushDeadline;
    bool is_handed_over = false;
    while (Clock::now() < deadline) {
        if (!is_handed_over) {
            if (!has_qpair()) return -ENODEV;
            const int error = ops_.flush(static_cast<Namespace&>(target).get(), qpair_, waited);
            if (error == 1) return 0;
            if (error != 0 && error != -ENOMEM) return error;
            is_handed_over = error == 0;
        }
        poll();
        start_waiting();
        if (waited.is_done) return waited.error;
        if (is_handed_over && qpair_ == nullptr) return -EIO;
    }
    drop_qpair();  // or the command would still know of this frame
    return -ETIMEDOUT;
}

bool SpdkQueue::lend(std::span<std::byte> memory) {
    if (!controller_->shape().needs_translation) return true;
    try {
        lent_.push_back(std::make_unique<Registration>(ops_, memory));
    } catch (const std::runtime_error&) {
        return false;
    }
    add_region(lent_.back()->bytes());
    return true;
}

void SpdkQueue::take_back(std::span<std::byte> memory) {
    const auto found = std::find_if(lent_.begin(), lent_.end(), [&](const auto& registration) {
        return lies_in(memory, registration->bytes().data(), registration->bytes().size());
    });
    if (found == lent_.end()) return;
    remove_region((*found)->bytes());
    lent_.erase(found);
}

void SpdkQueue::add_region(std::span<std::byte> memory) {
    regions_.push_back(memory);
}

void SpdkQueue::remove_region(std::span<std::byte> memory) {
    const auto uses = [&](const Flight& flight) {
        return flight.flying && lies_in(memory, flight.attempt.data, flight.attempt.length);
    };
    while (std::any_of(flights_.begin(), flights_.end(), uses)) poll();
    std::erase_if(regions_, [&](const auto& region) { return region.data() == memory.data(); });
}

}  // namespace hcache::spdk
