// A checksum of bytes at memory speed: it notices damage, it does not resist forgery.
//
// Thirty-two lanes take 32-bit words in turn; every step is invertible, so what one word changes
// stays in its lane's state unless a later word happens to undo exactly that.

#include <nanobind/nanobind.h>

#include <cstdint>
#include <cstring>

namespace nb = nanobind;

namespace {

constexpr int kLanes = 32;

inline uint32_t turn(uint32_t x, int by) { return x << by | x >> (32 - by); }

struct Lanes {
  uint32_t state[kLanes];

  void add(const uint8_t* bytes) {
    uint32_t word[kLanes];
    std::memcpy(word, bytes, sizeof word);
    for (int i = 0; i < kLanes; ++i) state[i] = turn(state[i] + word[i], 9);
  }
};

uint64_t checksum(const uint8_t* bytes, size_t size) {
  Lanes lanes;
  for (int i = 0; i < kLanes; ++i) lanes.state[i] = 0x9e3779b9u * (i + 1);
  size_t at = 0;
  for (; at + 4 * kLanes <= size; at += 4 * kLanes) lanes.add(bytes + at);
  uint8_t rest[4 * kLanes] = {};
  if (at < size) std::memcpy(rest, bytes + at, size - at);
  lanes.add(rest);
  uint64_t sum = size;
  for (uint32_t state : lanes.state)
    sum = ((sum ^ state) * 0x9e3779b97f4a7c15u) ^ sum >> 29;
  return sum;
}

uint64_t checksum_of(nb::handle buffer) {
  Py_buffer view;
  if (PyObject_GetBuffer(buffer.ptr(), &view, PyBUF_C_CONTIGUOUS) != 0) throw nb::python_error();
  uint64_t sum;
  {
    nb::gil_scoped_release unlocked;
    sum = checksum(static_cast<const uint8_t*>(view.buf), static_cast<size_t>(view.len));
  }
  PyBuffer_Release(&view);
  return sum;
}

}  // namespace

namespace coppice {
void bind_checksum(nb::module_& m) { m.def("checksum", &checksum_of); }
}  // namespace coppice
