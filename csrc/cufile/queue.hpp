// A queue of cuFile reads and writes: a few threads, each with one blocking call at a time. cuFile's own batch
// interface would do it with one thread, but needs nvidia-fs; these calls work in every mode, and cuFile cuts large
// ones itself.
#pragma once

#include <array>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <vector>

#include "../gpu/gpu.hpp"
#include "../io/queue.hpp"
#include "library.hpp"

namespace hcache::cufile {

/// Attempts' memory is device memory of one GPU, or host memory. Files are registered at their first use, and are let
/// go of once forgotten and no attempt on them is in flight. Teardown: threads, then files, then lent memory, then the
/// GPU.
class CufileQueue final : public io::Queue {
  public:
    /// `num_threads` of `depth` attempts run at a time. Throws std::runtime_error where there is no cuFile.
    CufileQueue(std::shared_ptr<gpu::Gpu> gpu, unsigned depth, unsigned num_threads);
    ~CufileQueue() override;

    unsigned depth() const override { return depth_; }
    void enqueue(const io::Attempt& attempt) override;
    void submit(bool wait) override;
    std::size_t reap(std::span<io::Done> out) override;
    void wake() override;
    void cancel() override;
    void forget(io::Target& target) override;
    bool lend(std::span<std::byte> memory) override;
    void take_back(std::span<std::byte> memory) override;

  private:
    class Registration;
    using Shared = std::shared_ptr<const Registration>;
    struct Job {
        io::Attempt attempt;
        Shared file;
        std::byte* base;
    };
    struct Ended {
        io::Done done;
        Shared file;
    };
    template <typename Pointer>
    using ByDescriptor = std::array<Pointer, 2>;  // [0] buffered, [1] direct

    Shared registration_of(io::File& file, bool direct);
    std::int64_t move(const Job& job) const;
    void work();
    void end_threads();

    const Library& library_;
    const std::shared_ptr<gpu::Gpu> gpu_;
    const unsigned depth_;

    // the queue's thread's own
    std::deque<Job> new_;
    std::unordered_map<io::File*, ByDescriptor<Shared>> files_;
    std::unordered_map<io::File*, ByDescriptor<std::weak_ptr<const Registration>>> forgotten_;
    std::vector<std::span<std::byte>> lent_;

    std::mutex lock_;
    std::condition_variable has_work_;
    std::condition_variable has_news_;
    std::deque<Job> waiting_;
    std::deque<Ended> ended_;
    bool rung_ = false;
    bool ending_ = false;

    std::vector<std::thread> threads_;
};

}  // namespace hcache::cufile
