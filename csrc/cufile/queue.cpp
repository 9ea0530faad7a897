#include "queue.hpp"

#include <pthread.h>

#include <algorithm>
#include <cerrno>
#include <iterator>
#include <stdexcept>
#include <system_error>

namespace hcache::cufile {

/// A descriptor that cuFile knows; its owner keeps it open for as long.
class CufileQueue::Registration {
  public:
    /// Throws std::system_error.
    Registration(const Library& library, int fd) : library_(library) {
        FileDescription description;
        description.handle.fd = fd;
        const Status status = library_.handle_register(&handle_, &description);
        if (status.error != 0) throw std::system_error(errno_of(status.error), std::generic_category());
    }
    ~Registration() { library_.handle_deregister(handle_); }
    Registration(const Registration&) = delete;
    Registration& operator=(const Registration&) = delete;
    void* handle() const { return handle_; }

  private:
    const Library& library_;
    void* handle_ = nullptr;
};

CufileQueue::CufileQueue(std::shared_ptr<gpu::Gpu> gpu, unsigned depth, unsigned num_threads)
    : library_(Library::get()), gpu_(std::move(gpu)), depth_(depth) {
    gpu_->enter();
    try {
        for (unsigned idx = 0; idx < num_threads; ++idx) threads_.emplace_back([this] { work(); });
    } catch (...) {
        end_threads();
        throw;
    }
}

CufileQueue::~CufileQueue() {
    end_threads();
    files_.clear();
    for (const auto& memory : lent_) library_.buffer_deregister(memory.data());
}

void CufileQueue::end_threads() {
    {
        const std::scoped_lock guard(lock_);
        ending_ = true;
    }
    has_work_.notify_all();
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
}

void CufileQueue::enqueue(const io::Attempt& attempt) {
    const bool direct = attempt.target->may_go_direct(attempt.offset, attempt.data, attempt.length);
    Job job{attempt, nullptr, attempt.data};
    for (const auto& memory : lent_) {  // cuFile finds registered memory by where it begins
        const bool is_in =
            attempt.data >= memory.data() && attempt.data + attempt.length <= memory.data() + memory.size();
        if (is_in) job.base = memory.data();
    }
    try {
        job.file = registration_of(static_cast<io::File&>(*attempt.target), direct);
    } catch (const std::system_error& error) {
        const std::scoped_lock guard(lock_);
        ended_.push_back({{attempt.token, -error.code().value()}, nullptr});
        return;
    }
    new_.push_back(std::move(job));
}

void CufileQueue::submit(bool wait) {
    std::unique_lock guard(lock_);
    const std::size_t num_new = new_.size();
    std::move(new_.begin(), new_.end(), std::back_inserter(waiting_));
    new_.clear();
    if (num_new == 1) {
        has_work_.notify_one();
    } else if (num_new > 1) {
        has_work_.notify_all();
    }
    if (wait) has_news_.wait(guard, [&] { return rung_ || !ended_.empty(); });
    rung_ = false;
}

std::size_t CufileQueue::reap(std::span<io::Done> out) {
    std::vector<Shared> unused;  // the last use of a forgotten file: let go of here, before anybody learns of the end
    std::size_t num = 0;
    {
        const std::scoped_lock guard(lock_);
        for (; num < out.size() && !ended_.empty(); ended_.pop_front()) {
            out[num++] = ended_.front().done;
            unused.push_back(std::move(ended_.front().file));
        }
    }
    return num;
}

void CufileQueue::wake() {
    const std::scoped_lock guard(lock_);
    rung_ = true;
    has_news_.notify_one();
}

void CufileQueue::cancel() {
    const std::scoped_lock guard(lock_);
    for (std::deque<Job>* const jobs : {&new_, &waiting_}) {
        for (Job& job : *jobs) ended_.push_back({{job.attempt.token, -ECANCELED}, std::move(job.file)});
        jobs->clear();
    }
}

CufileQueue::Shared CufileQueue::registration_of(io::File& file, bool direct) {
    if (file.slots[direct] == io::kForgotten) {  // kept by the attempts on it alone: any of them may be the last
        auto& known = forgotten_[&file][direct];
        Shared registration = known.lock();
        if (!registration) {
            known = registration = std::make_shared<const Registration>(library_, file.descriptor(direct));
        }
        return registration;
    }
    Shared& registration = files_[&file][direct];
    if (!registration) registration = std::make_shared<const Registration>(library_, file.descriptor(direct));
    return registration;
}

void CufileQueue::forget(io::Target& target) {
    auto& file = static_cast<io::File&>(target);
    file.slots.fill(io::kForgotten);
    std::erase_if(forgotten_, [](const auto& entry) { return entry.second[0].expired() && entry.second[1].expired(); });
    const auto known = files_.find(&file);
    if (known == files_.end()) return;
    forgotten_[&file] = {known->second[0], known->second[1]};  // cuFile knows a descriptor once at most
    files_.erase(known);
}

bool CufileQueue::lend(std::span<std::byte> memory) {
    if (memory.empty() || library_.buffer_register(memory.data(), memory.size(), 0).error != 0) return false;
    lent_.push_back(memory);
    return true;
}

void CufileQueue::take_back(std::span<std::byte> memory) {
    const auto found = std::find_if(lent_.begin(), lent_.end(), [&](const std::span<std::byte>& one) {
        return one.data() == memory.data() && one.size() == memory.size();
    });
    if (found == lent_.end()) return;
    library_.buffer_deregister(found->data());
    lent_.erase(found);
}

std::int64_t CufileQueue::move(const Job& job) const {
    const io::Attempt& attempt = job.attempt;
    const auto file_offset = static_cast<off_t>(attempt.offset);
    const auto base_offset = static_cast<off_t>(attempt.data - job.base);
    errno = 0;
    const ssize_t moved = attempt.op == io::Op::read
                              ? library_.read(job.file->handle(), job.base, attempt.length, file_offset, base_offset)
                              : library_.write(job.file->handle(), job.base, attempt.length, file_offset, base_offset);
    if (moved >= 0) return moved;
    if (moved == -1) return errno != 0 ? -errno : -EIO;
    return -errno_of(static_cast<int>(-moved));
}

void CufileQueue::work() {
    pthread_setname_np(pthread_self(), "hcache-cufile");
    try {
        gpu_->enter();
    } catch (const std::runtime_error&) {  // then the transfers say what is wrong
    }
    std::unique_lock guard(lock_);
    while (true) {
        has_work_.wait(guard, [&] { return ending_ || !waiting_.empty(); });
        if (waiting_.empty()) return;
        Job job = std::move(waiting_.front());
        waiting_.pop_front();
        guard.unlock();
        const std::int64_t result = move(job);
        guard.lock();
        ended_.push_back({{job.attempt.token, result}, std::move(job.file)});
        has_news_.notify_one();
    }
}

}  // namespace hcache::cufile
