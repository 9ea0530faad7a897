// A shared library of the system, found at run time: what needs it says why it is not there, and all else goes on.
#pragma once

#include <string>

namespace hcache::gpu {

/// Loaded, and never unloaded: drivers leave threads and exit functions behind.
class Library {
  public:
    /// `name` as for dlopen, or what the environment variable `variable` says instead. Throws std::runtime_error with
    /// the loader's words.
    Library(const char* name, const char* variable);

    /// Throws std::runtime_error when there is no such symbol.
    template <typename Function>
    void find(Function*& function, const char* symbol) const {
        function = reinterpret_cast<Function*>(address_of(symbol));
    }

    /// Null when there is no such symbol.
    template <typename Function>
    void find_if_there(Function*& function, const char* symbol) const {
        function = reinterpret_cast<Function*>(address_if_there(symbol));
    }

  private:
    void* address_if_there(const char* symbol) const;
    void* address_of(const char* symbol) const;
    std::string name_;
    void* library_;
};

}  // namespace hcache::gpu
