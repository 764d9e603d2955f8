// Python's way to a Program: ../native/program.py, which alone calls this, checks what it
// describes and keeps what it points to alive.

#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <new>

#include "program.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace coppice {
namespace {

using Address = uintptr_t;

template <class T = const float>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

void bind_program(nb::module_& m) {
  nb::class_<Layer>(m, "Layer", "One layer of a program; 0 for a norm that is not there.")
      .def(
          "__init__",
          [](Layer* self, const Packed& qkv, const Packed& output, const Packed& gate_up,
             const Packed& down, Address before_attention, Address after_attention,
             Address before_mlp, Address after_mlp, Address q_norm, Address k_norm,
             Address cos_sin, int64_t half, int32_t window) {
            new (self) Layer{qkv,
                             output,
                             gate_up,
                             down,
                             at(before_attention),
                             at(after_attention),
                             at(before_mlp),
                             at(after_mlp),
                             at(q_norm),
                             at(k_norm),
                             at(cos_sin),
                             half,
                             window};
          },
          nb::kw_only(), "qkv"_a, "output"_a, "gate_up"_a, "down"_a, "before_attention"_a,
          "after_attention"_a, "before_mlp"_a, "after_mlp"_a, "q_norm"_a, "k_norm"_a,
          "cos_sin"_a, "half"_a, "window"_a);
  nb::class_<Program>(m, "Program", "A decoder's forward pass; see program.h.")
      .def(
          "__init__",
          [](Program* self, const Packed& embedding, const Packed& head, Address norm,
             int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t max_position,
             int qk_norm, int activation, float eps, float attention_scale,
             float attention_softcap, float embedding_scale, const std::vector<Layer>& layers) {
            new (self) Program({embedding, head, at(norm), heads, kv_heads, head_dim,
                                max_position, qk_norm, activation, eps, attention_scale,
                                attention_softcap, embedding_scale},
                               layers);
          },
          nb::kw_only(), "embedding"_a, "head"_a, "norm"_a, "heads"_a, "kv_heads"_a,
          "head_dim"_a, "max_position"_a, "qk_norm"_a, "activation"_a, "eps"_a,
          "attention_scale"_a, "attention_softcap"_a, "embedding_scale"_a, "layers"_a)
      .def("use_pages", &Program::use_pages)
      .def(
          "run",
          [](Program& self, Address token, const RowArrays& rows, Address wanted,
             int64_t num_wanted, Address logits) {
            self.run({at<const int32_t>(token), rows, at<const int32_t>(wanted), num_wanted},
                     at<float>(logits));
          },
          nb::call_guard<nb::gil_scoped_release>())
      .def("run_greedy", [](Program& self, Address token, const RowArrays& rows, Address wanted,
                            int64_t num_wanted, int64_t vocabulary) {
        std::vector<int32_t> found(num_wanted);
        {
          const nb::gil_scoped_release unlocked;
          self.run_greedy({at<const int32_t>(token), rows, at<const int32_t>(wanted), num_wanted},
                          vocabulary, found.data());
        }
        return found;
      });
}

}  // namespace coppice
