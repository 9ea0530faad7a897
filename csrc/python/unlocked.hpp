// Work without the GIL, for what NVIDIA's libraries do.
#pragma once

#include <pybind11/pybind11.h>

#include <cerrno>
#include <stdexcept>
#include <string>
#include <system_error>

namespace hcache::python {

/// Runs `work` without the GIL; what NVIDIA's libraries refuse is an OSError. An std::invalid_argument becomes a
/// ValueError, by pybind11.
template <typename Work>
auto unlocked(Work&& work) {
    std::string refused;
    int number = EIO;
    try {
        const pybind11::gil_scoped_release released;
        return work();
    } catch (const std::system_error& error) {
        refused = error.what();
        number = error.code().value();
    } catch (const std::runtime_error& error) {
        refused = error.what();
    }
    PyErr_SetObject(PyExc_OSError, pybind11::make_tuple(number, refused).ptr());
    throw pybind11::error_already_set();
}

}  // namespace hcache::python
