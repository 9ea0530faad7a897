#include "library.hpp"

#include <dlfcn.h>

#include <cstdlib>
#include <stdexcept>

namespace hcache::gpu {

Library::Library(const char* name, const char* variable) : name_(name) {
    const char* const chosen = std::getenv(variable);
    if (chosen != nullptr && *chosen != '\0') name_ = chosen;
    library_ = ::dlopen(name_.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library_ == nullptr) throw std::runtime_error(::dlerror());
}

void* Library::address_if_there(const char* symbol) const {
    return ::dlsym(library_, symbol);
}

void* Library::address_of(const char* symbol) const {
    void* const found = address_if_there(symbol);
    if (found == nullptr) throw std::runtime_error(name_ + " has no " + symbol + ": it is too old");
    return found;
}

}  // namespace hcache::gpu
