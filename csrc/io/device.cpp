#include "device.hpp"

#include <pthread.h>

#include <algorithm>
#include <array>
#include <csignal>
#include <utility>

#include "batch.hpp"

namespace hcache::io {
namespace {

constexpr std::uint64_t kMaxAttemptBytes = std::uint64_t{1} << 30;  // the kernel moves just under 2 GiB at a time
constexpr unsigned kMaxTries = 100;

}  // namespace

Transfer::~Transfer() {
    if (!batch_) return;
    batch_->dropped = true;
    batch_->wait_forever();
}

std::size_t Transfer::size() const {
    return batch_->requests.size();
}

std::optional<std::int64_t> Transfer::wait(std::size_t idx, std::chrono::milliseconds timeout) const {
    return batch_->wait(idx, timeout);
}

bool Transfer::wait_all(std::chrono::milliseconds timeout) const {
    return batch_->wait_all(timeout);
}

Device::Device(const MakeQueue& make_queue) {
    std::exception_ptr failure;
    thread_ = std::thread([this, &make_queue, &failure] { work(make_queue, failure); });
    {
        std::unique_lock guard(lock_);
        changed_.wait(guard, [&] { return started_; });
    }
    if (failure) {
        thread_.join();
        std::rethrow_exception(failure);
    }
}

Device::~Device() {
    close();
}

Transfer Device::submit(std::vector<Request> requests) {
    auto batch = std::make_shared<Batch>(std::move(requests));
    std::unique_lock guard(lock_);
    if (closing_) {
        guard.unlock();
        for (std::size_t idx = 0; idx < batch->requests.size(); ++idx) batch->finish(idx, -ECANCELED);
    } else if (!batch->requests.empty()) {
        inbox_.push_back(batch);
        if (sleeping_) queue_->wake();
    }
    return Transfer(std::move(batch));
}

bool Device::run(const std::function<void(Queue&)>& job) {
    std::unique_lock guard(lock_);
    if (closing_) return false;
    jobs_.push_back(&job);
    const std::uint64_t number = ++num_jobs_asked_;
    if (sleeping_) queue_->wake();
    changed_.wait(guard, [&] { return num_jobs_done_ >= number; });
    return true;
}

void Device::forget(Target& target) {
    run([&target](Queue& queue) { queue.forget(target); });
}

void Device::cancel() {
    const std::scoped_lock guard(lock_);
    if (closing_) return;
    cancelling_ = true;
    if (sleeping_) queue_->wake();
}

void Device::close() {
    const std::scoped_lock only_one(closing_lock_);
    if (!thread_.joinable()) return;
    {
        const std::scoped_lock guard(lock_);
        closing_ = true;
        if (sleeping_) queue_->wake();
    }
    thread_.join();
}

DeviceStats Device::stats() const {
    return {num_attempts_, num_direct_, num_carried_on_, num_errors_};
}

void Device::work(const MakeQueue& make_queue, std::exception_ptr& failure) {
    sigset_t all;  // signals are for the threads of the program that we are part of
    sigfillset(&all);
    pthread_sigmask(SIG_BLOCK, &all, nullptr);
    pthread_setname_np(pthread_self(), "hcache-io");
    try {
        queue_ = make_queue();
        flights_.resize(queue_->depth());
        for (std::size_t slot = flights_.size(); slot-- > 0;) free_.push_back(slot);
    } catch (...) {
        failure = std::current_exception();
    }
    const bool is_good = queue_ != nullptr;
    {
        const std::scoped_lock guard(lock_);
        started_ = true;
    }
    changed_.notify_all();  // from here on `failure` may be gone
    if (is_good) loop();
    std::unique_ptr<Queue> ended;
    {
        const std::scoped_lock guard(lock_);
        sleeping_ = false;
        ended = std::move(queue_);
    }
}

void Device::loop() {
    std::array<Done, 64> done;
    while (true) {
        take_inbox();
        start_waiting();
        if (ending_ && free_.size() == flights_.size()) return;
        queue_->submit(true);
        sleeping_ = false;
        std::size_t num;
        do {
            num = queue_->reap(done);
            for (std::size_t idx = 0; idx < num; ++idx) handle(done[idx]);
        } while (num == done.size());
    }
}

void Device::take_inbox() {
    std::vector<std::shared_ptr<Batch>> batches;
    std::vector<const std::function<void(Queue&)>*> jobs;
    bool cancelling = false;
    {
        const std::scoped_lock guard(lock_);
        batches.swap(inbox_);
        jobs.swap(jobs_);
        sleeping_ = true;
        cancelling = std::exchange(cancelling_, false);
        if (closing_ && !ending_) {
            ending_ = true;
            if (free_.size() < flights_.size()) queue_->cancel();
        }
    }
    for (const auto* job : jobs) (*job)(*queue_);
    if (!jobs.empty()) {
        const std::scoped_lock guard(lock_);
        num_jobs_done_ += jobs.size();
        changed_.notify_all();
    }
    for (auto& batch : batches) {
        for (std::size_t idx = 0; idx < batch->requests.size(); ++idx) waiting_.push_back({batch, idx});
    }
    if (cancelling) cancel_all();
}

void Device::cancel_all() {
    for (const Next& next : waiting_) next.batch->finish(next.idx, -ECANCELED);
    waiting_.clear();
    if (free_.size() == flights_.size()) return;
    for (Flight& flight : flights_) flight.cancelled = flight.batch != nullptr;
    queue_->cancel();
}

void Device::start_waiting() {
    while (!waiting_.empty()) {
        Next& next = waiting_.front();
        if (ending_ || next.batch->dropped) {
            next.batch->finish(next.idx, -ECANCELED);
        } else if (next.batch->requests[next.idx].length == 0) {
            next.batch->finish(next.idx, 0);
        } else if (free_.empty()) {
            return;
        } else {
            const std::size_t slot = free_.back();
            free_.pop_back();
            flights_[slot] = Flight{std::move(next.batch), next.idx};
            start(slot);
        }
        waiting_.pop_front();
    }
}

void Device::start(std::size_t slot) {
    Flight& flight = flights_[slot];
    const Request& request = flight.batch->requests[flight.idx];
    const std::uint64_t offset = request.offset + flight.moved;
    std::byte* const data = request.data + flight.moved;
    flight.asked = static_cast<std::uint32_t>(std::min(request.length - flight.moved, kMaxAttemptBytes));
    flight.direct = request.target->may_go_direct(offset, data, flight.asked);
    ++num_attempts_;
    num_direct_ += flight.direct;
    queue_->enqueue({request.op, request.target.get(), offset, data, flight.asked, slot});
}

void Device::handle(const Done& done) {
    const std::size_t slot = done.token;
    Flight& flight = flights_[slot];
    const Request& request = flight.batch->requests[flight.idx];
    if (done.result == -EINTR || done.result == -EAGAIN) {
        if (ending_ || flight.cancelled) {
            finish(slot, -ECANCELED);
        } else if (++flight.num_tries <= kMaxTries) {
            start(slot);
        } else {
            finish(slot, done.result);
        }
    } else if (done.result == -EINVAL && flight.direct) {
        request.target->give_up_direct();
        start(slot);
    } else if (done.result < 0) {
        finish(slot, done.result);
    } else if (done.result == 0) {  // the end of the file; a write that makes no progress never will
        finish(slot, request.op == Op::read ? static_cast<std::int64_t>(flight.moved) : -EIO);
    } else {
        flight.moved += static_cast<std::uint64_t>(done.result);
        flight.num_tries = 0;
        if (flight.moved >= request.length) {
            finish(slot, static_cast<std::int64_t>(flight.moved));
        } else if (ending_ || flight.cancelled) {
            finish(slot, -ECANCELED);
        } else {
            ++num_carried_on_;
            start(slot);
        }
    }
}

void Device::finish(std::size_t slot, std::int64_t result) {
    num_errors_ += result < 0;
    const Flight flight = std::move(flights_[slot]);
    flights_[slot] = Flight{};
    free_.push_back(slot);
    flight.batch->finish(flight.idx, result);
}

}  // namespace hcache::io
