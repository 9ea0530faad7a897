// NVMe controllers and their namespaces, owned.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "../io/file.hpp"
#include "ops.hpp"

namespace hcache::spdk {

/// Most bytes that one attempt moves; the engine carries on with the rest. SPDK splits it further for the device.
inline constexpr std::uint32_t kMaxAttemptBytes = 1U << 20;

/// A connected controller. Any thread; must outlive queues and namespaces of it, which hold it for that reason.
class Controller {
  public:
    /// Starts SPDK's environment when it was not started in this process: the first caller's `options` count. `depth`:
    /// most attempts in flight in one queue. Blocks. Throws std::runtime_error with the reason.
    Controller(const Ops& ops, const EnvOptions& options, const std::string& transport_id, unsigned depth);
    ~Controller();
    Controller(const Controller&) = delete;
    Controller& operator=(const Controller&) = delete;

    const Ops& ops() const { return ops_; }
    Ctrlr* get() const { return ctrlr_; }
    unsigned depth() const { return depth_; }
    const CtrlrShape& shape() const { return shape_; }

  private:
    const Ops& ops_;
    unsigned depth_;
    Ctrlr* ctrlr_ = nullptr;
    CtrlrShape shape_;
};

/// What an SpdkQueue's transfers go to: offsets are bytes from the namespace's first.
class Namespace final : public io::Target {
  public:
    /// Throws std::runtime_error for a namespace that is not there or has sectors that are not ours to use.
    Namespace(std::shared_ptr<Controller> controller, std::uint32_t id);

    /// Always: there is no cache of the host.
    bool is_direct() const override { return true; }
    /// Never: there is nothing to go through instead.
    bool may_go_direct(std::uint64_t, const std::byte*, std::uint64_t) const override { return false; }
    void give_up_direct() override {}

    Ns* get() const { return ns_; }
    const NsShape& shape() const { return shape_; }
    std::uint64_t num_bytes() const { return shape_.num_sectors * shape_.sector_bytes; }
    const std::shared_ptr<Controller>& controller() const { return controller_; }

  private:
    std::shared_ptr<Controller> controller_;
    NsShape shape_;
    Ns* ns_ = nullptr;
};

}  // namespace hcache::spdk
