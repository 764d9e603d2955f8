// Python's way in: raw addresses and sizes, checked by ../native.py, which alone calls this.

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstdint>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "driver.h"

namespace nb = nanobind;

namespace {

using Address = uintptr_t;
using Unlocked = nb::call_guard<nb::gil_scoped_release>;

template <class T = float>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Ask for huge pages: weights are streamed whole, and page walks cost a quarter of it.
void advise_huge(Address begin, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const Address page = 4096, first = (begin + page - 1) / page * page;
  const Address last = (begin + static_cast<Address>(bytes)) / page * page;
  if (last > first) madvise(at<void>(first), last - first, MADV_HUGEPAGE);
#else
  (void)begin, (void)bytes;
#endif
}

void bind_linear(nb::module_& m) {
  nb::class_<coppice::Packed>(m, "Packed", "Addresses and shape of one packed weight.")
      .def("__init__", [](coppice::Packed* self, Address data, Address scales, Address zeros,
                          Address bias, int64_t n, int64_t k, int64_t group, int format) {
        new (self) coppice::Packed{at<void>(data), at<void>(scales), at<void>(zeros), at(bias),
                                   n,              k,                group,           format};
      });
  m.def(
      "linear",
      [](const coppice::Packed& w, Address x, Address residual, Address out, int64_t rows) {
        coppice::linear(w, at(x), rows, at(residual), at(out));
      },
      Unlocked());
  m.def(
      "pack",
      [](const coppice::Packed& w, Address source, bool source_bf16, int64_t first,
         int64_t count) {
        coppice::pack(coppice::PackArgs{w, at<void>(source), first, count, source_bf16});
      },
      Unlocked());
  m.def(
      "pack_codes",
      [](const coppice::Packed& w, Address codes, Address scales, Address zeros, int64_t first,
         int64_t count) {
        coppice::pack(coppice::PackCodesArgs{w, at<int8_t>(codes), at<void>(scales),
                                             at<int8_t>(zeros), first, count});
      },
      Unlocked());
  m.def(
      "unpack", [](const coppice::Packed& w, Address out) { coppice::unpack(w, at(out)); },
      Unlocked());
  m.def(
      "gather",
      [](const coppice::Packed& w, Address token, Address out, int64_t rows) {
        coppice::gather(w, at<int32_t>(token), rows, at(out));
      },
      Unlocked());
}

void bind_elementwise(nb::module_& m) {
  m.def(
      "norm",
      [](Address x, Address weight, Address out, int64_t rows, int64_t n, float eps) {
        coppice::norm({at(x), at(weight), at(out), rows, n, eps});
      },
      Unlocked());
  m.def(
      "gate",
      [](Address gate_up, Address out, int64_t rows, int64_t n, int kind) {
        coppice::gate({at(gate_up), at(out), rows, n, kind});
      },
      Unlocked());
}

void bind_attention(nb::module_& m) {
  nb::class_<coppice::RowArrays>(m, "RowArrays", "Addresses of one step's row arrays.")
      .def("__init__", [](coppice::RowArrays* self, Address position, Address sequence,
                          Address parent, Address slot, Address page_table, Address prefix_len,
                          int64_t rows, int64_t sequences, int64_t max_pages) {
        new (self) coppice::RowArrays{
            at<int32_t>(position),   at<int32_t>(sequence),   at<int32_t>(parent),
            at<int32_t>(slot),       at<int32_t>(page_table), at<int32_t>(prefix_len),
            rows,                    sequences,               max_pages};
      })
      .def_prop_ro("positions", [](const coppice::RowArrays& self) {
        int32_t last = -1;
        for (int64_t i = 0; i < self.rows; ++i) last = std::max(last, self.position[i]);
        return last + 1;
      });
  nb::class_<coppice::Cache>(m, "Cache", "Addresses and shape of one layer's KV pages.")
      .def("__init__", [](coppice::Cache* self, Address k, Address v, int64_t pages,
                          int64_t kv_heads, int64_t page_size, int64_t head_dim, int kind) {
        new (self) coppice::Cache{at<void>(k), at<void>(v), pages, kv_heads,
                                  page_size,   head_dim,    kind};
      });
  m.def(
      "rope",
      [](Address qkv, Address cos_sin, Address q_weight, Address k_weight, Address q,
         const coppice::Cache& cache, const coppice::RowArrays& rows, int64_t heads, int64_t half,
         int qk_norm, float eps, int64_t max_position) {
        coppice::check_slots(rows, cache);
        if (half > 0) coppice::check_positions(rows, max_position);
        coppice::rope({at(qkv), at(cos_sin), at(q_weight), at(k_weight), at(q), cache, rows,
                       heads, half, qk_norm, eps});
      },
      Unlocked());
  m.def(
      "attention",
      [](Address q, Address sinks, Address out, const coppice::Cache& cache,
         const coppice::RowArrays& rows, int64_t heads, float scale, float softcap,
         int32_t window) {
        coppice::check_slots(rows, cache);
        coppice::check_prefix(rows, cache);
        coppice::Tiles tiles;
        tiles.lay(rows, heads / cache.kv_heads);
        coppice::attention({at(q), at(sinks), at(out), cache, rows, nullptr, nullptr, 0, heads,
                            scale, softcap, window},
                           tiles);
      },
      Unlocked());
}

}  // namespace

namespace coppice {
void bind_sampler(nb::module_& m);  // sampler.cpp
void bind_program(nb::module_& m);  // bind_program.cpp
void bind_suffix(nb::module_& m);   // bind_suffix.cpp
void bind_checksum(nb::module_& m);  // checksum.cpp
}

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);  // at exit nothing is destroyed on purpose: threads may still idle
  m.doc() = "Native CPU kernels; see coppice.kernels.native.";
  m.def("available", &coppice::available);
  m.def("isa", &coppice::isa);
  m.def("set_isa", &coppice::set_isa);
  m.def("num_threads", &coppice::num_threads);
  m.def("set_num_threads", &coppice::set_num_threads, Unlocked());
  m.def("expect_work", &coppice::expect_work);
  nb::class_<coppice::Team>(m, "Team", "Threads of their own; see parallel.h.")
      .def(nb::init<int>())
      .def("enter", &coppice::Team::enter)
      .def_static("leave", &coppice::Team::leave);
  m.def("advise_huge", &advise_huge);
  m.def(
      "read_probe",
      [](Address p, int64_t count, int rounds) {
        return coppice::read_probe(at(p), count, rounds);
      },
      Unlocked());
  m.def("fma_probe", &coppice::fma_probe, Unlocked());
  m.def("int8_probe", &coppice::int8_probe, Unlocked());
  bind_linear(m);
  bind_elementwise(m);
  bind_attention(m);
  coppice::bind_sampler(m);
  coppice::bind_program(m);
  coppice::bind_suffix(m);
  coppice::bind_checksum(m);
}
