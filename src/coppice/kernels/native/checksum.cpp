// A checksum of bytes at memory speed: it notices damage, it does not resist forgery.
//
// Sixteen lanes take 32-bit words in turn. Every step is invertible, so what one word changes
// stays in its lane's state; the second half of a state remembers what later words undo in the
// first.

#include <nanobind/nanobind.h>

#include <cstdint>
#include <cstring>

namespace nb = nanobind;

namespace {

constexpr int kLanes = 16;

inline uint32_t turn(uint32_t x, int by) { return x << by | x >> (32 - by); }

struct Lanes {
  uint32_t a[kLanes], b[kLanes];

  void add(const uint8_t* bytes) {
    uint32_t word[kLanes];
    std::memcpy(word, bytes, sizeof word);
    for (int i = 0; i < kLanes; ++i) {
      a[i] = turn(a[i] + word[i], 9);
      b[i] = turn(b[i] ^ a[i], 5) + a[i];
    }
  }
};

uint64_t checksum(const uint8_t* bytes, size_t size) {
  Lanes lanes;
  for (int i = 0; i < kLanes; ++i) lanes.a[i] = 0x9e3779b9u * (i + 1), lanes.b[i] = ~lanes.a[i];
  size_t at = 0;
  for (; at + 4 * kLanes <= size; at += 4 * kLanes) lanes.add(bytes + at);
  uint8_t rest[4 * kLanes] = {};
  if (at < size) std::memcpy(rest, bytes + at, size - at);
  lanes.add(rest);
  uint64_t sum = size;
  for (int i = 0; i < kLanes; ++i) {
    sum = (sum ^ (static_cast<uint64_t>(lanes.b[i]) << 32 | lanes.a[i])) * 0x9e3779b97f4a7c15u;
    sum ^= sum >> 29;
  }
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
