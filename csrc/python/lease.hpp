// What the parts of Python's view share.
#pragma once

#include <pybind11/pybind11.h>

#include <cerrno>
#include <cstddef>
#include <span>
#include <system_error>

namespace hcache::python {

namespace py = pybind11;

/// A Python object's bytes, which stay where they are as long as this lives. Held and let go of with the GIL.
class Lease {
  public:
    Lease(const py::handle& object, bool writable) {
        const int flags = writable ? PyBUF_WRITABLE : PyBUF_SIMPLE;  // both mean C-contiguous
        if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) throw py::error_already_set();
    }
    ~Lease() {
        if (view_.obj != nullptr) PyBuffer_Release(&view_);
    }
    Lease(Lease&& other) noexcept : view_(other.view_) { other.view_.obj = nullptr; }
    Lease& operator=(Lease&&) = delete;
    std::byte* data() const { return static_cast<std::byte*>(view_.buf); }
    std::size_t size() const { return static_cast<std::size_t>(view_.len); }
    std::span<std::byte> bytes() const { return {data(), size()}; }

  private:
    Py_buffer view_{};
};

/// Raises errno as the OSError that Python's own calls would raise.
[[noreturn]] inline void raise(const std::system_error& error) {
    errno = error.code().value();
    PyErr_SetFromErrno(PyExc_OSError);
    throw py::error_already_set();
}

}  // namespace hcache::python
