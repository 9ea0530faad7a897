#include "controller.hpp"

#include <cstring>
#include <map>
#include <mutex>
#include <stdexcept>

namespace hcache::spdk {
namespace {

constexpr std::uint32_t kMaxSectorBytes = 4096;  // the format's blocks: a sector may not be longer
constexpr unsigned kMinMaxTransferBytes = 128 << 10;

void start_environment(const Ops& ops, const EnvOptions& options) {
    static std::mutex lock;
    static std::map<const Ops*, int> results;
    const std::scoped_lock guard(lock);
    const auto [place, is_first] = results.try_emplace(&ops, 0);
    if (is_first) place->second = ops.env_init(options);
    if (place->second != 0) {
        throw std::runtime_error(std::string("SPDK's environment does not start in this process (") +
                                 std::strerror(place->second < 0 ? -place->second : place->second) +
                                 "): are there huge pages, and may this user use them?");
    }
}

}  // namespace

Controller::Controller(const Ops& ops, const EnvOptions& options, const std::string& transport_id, unsigned depth)
    : ops_(ops), depth_(depth) {
    start_environment(ops, options);
    std::string why;
    // an attempt and its parts, were the device to take no more than usual at a time
    ctrlr_ = ops.connect(transport_id, depth * (1 + kMaxAttemptBytes / kMinMaxTransferBytes), why);
    if (ctrlr_ == nullptr) throw std::runtime_error(why);
    shape_ = ops.describe(ctrlr_);
}

Controller::~Controller() {
    ops_.disconnect(ctrlr_);
}

Namespace::Namespace(std::shared_ptr<Controller> controller, std::uint32_t id) : controller_(std::move(controller)) {
    ns_ = controller_->ops().open_namespace(controller_->get(), id, shape_);
    if (ns_ == nullptr) throw std::runtime_error("the controller has no active namespace " + std::to_string(id));
    if (shape_.has_metadata) throw std::runtime_error("the namespace's sectors carry metadata: format it without");
    if (shape_.sector_bytes == 0 || kMaxSectorBytes % shape_.sector_bytes != 0) {
        throw std::runtime_error("the namespace's sectors have " + std::to_string(shape_.sector_bytes) +
                                 " bytes: 512 or 4096 would do");
    }
}

}  // namespace hcache::spdk
