// Python's way to the suffix index: ../suffix.py, which alone calls this, checks arguments.

#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include <tuple>

#include "suffix.h"

namespace nb = nanobind;

namespace coppice {

void bind_suffix(nb::module_& m) {
  nb::class_<SuffixIndex>(m, "SuffixIndex", "A text and where its tokens were seen; suffix.h.")
      .def(nb::init<int64_t, int64_t>())
      .def("extend",
           [](SuffixIndex& self, const std::vector<int32_t>& tokens) {
             self.extend(tokens.data(), tokens.size());
           })
      .def("end_text", &SuffixIndex::end_text)
      .def("tokens", &SuffixIndex::tokens)
      .def("__len__", &SuffixIndex::size)
      .def_prop_ro("size_bytes", &SuffixIndex::bytes)
      .def(
          "propose",
          [](const SuffixIndex& self, const SuffixIndex* history, size_t limit) {
            SuffixProposal tree = propose_suffix(self, history, limit);
            nb::list tokens, parents, logf;
            for (int32_t each : tree.tokens) tokens.append(each);
            for (int32_t each : tree.parents) parents.append(each);
            for (double each : tree.logf) logf.append(each);
            return nb::make_tuple(tokens, parents, logf);
          },
          nb::arg("history").none(), nb::arg("limit"));
}

}  // namespace coppice
