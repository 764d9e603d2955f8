// Choosing tokens: the steps of ../sampling.py STEPS for every row, rows over the threads.
//
// The passes over the vocabulary are in sampler_lanes.h. Here are the sparse edits, the cuts
// and the logprobs. Compiled without contraction, as ../sampling_reference.py computes.

#include "sampler.h"

#include <nanobind/nanobind.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "driver.h"

namespace coppice {
namespace {

constexpr uint8_t NOT_FINITE = 1, NOTHING_ALLOWED = 2;
constexpr float NEVER = -std::numeric_limits<float>::infinity();
constexpr double LN2 = 0.6931471805599453;
constexpr int MASS_BITS = 44;

using Keys = std::vector<uint64_t>;
const auto first = std::greater<uint64_t>();

struct Scratch {
  std::vector<float> x, y, saved;
  Keys keys;
  std::vector<uint64_t> masses;
};

void add_penalties(float* x, int64_t n, const SamplerRow& row) {
  for (int32_t i = 0; i < row.num_seen; ++i) {
    const int64_t token = row.seen_ids[i];
    if (token < 0 || token >= n) continue;
    const int32_t count = row.seen_counts[i];
    float value = x[token];
    if (row.repetition != 1.0f && (count > 0 || row.seen_prompt[i]))
      value = value > 0.0f ? value / row.repetition : value * row.repetition;
    value = value - row.frequency * static_cast<float>(count);
    x[token] = count > 0 ? value - row.presence : value;
  }
}

void apply_mask(float* x, int64_t n, const int32_t* mask, int64_t words) {
  for (int64_t w = 0; w * 32 < n; ++w) {
    const uint32_t bits = w < words ? static_cast<uint32_t>(mask[w]) : 0;
    if (bits == 0xffffffffu) continue;
    const int64_t end = std::min<int64_t>(32, n - w * 32);
    for (int64_t b = 0; b < end; ++b)
      if (!(bits >> b & 1)) x[w * 32 + b] = NEVER;
  }
}

// Ban the ending tokens, unless nothing else is left.
void ban(float* x, int64_t n, const SamplerRow& row, const SamplerTable& lanes, Scratch& s) {
  s.saved.clear();
  for (int32_t i = 0; i < row.num_banned; ++i) {
    const int64_t token = row.banned_ids[i];
    const bool inside = token >= 0 && token < n;
    s.saved.push_back(inside ? x[token] : 0.0f);
    if (inside) x[token] = NEVER;
  }
  float top;
  lanes.scan(x, n, &top);
  if (top > NEVER) return;
  for (int32_t i = 0; i < row.num_banned; ++i) {
    const int64_t token = row.banned_ids[i];
    if (token >= 0 && token < n) x[token] = s.saved[i];
  }
}

const float* process(const float* raw, int64_t n, const SamplerRow& row, const int32_t* mask,
                     int64_t mask_words, const SamplerTable& lanes, Scratch& s) {
  if (!row.num_bias && !row.num_seen && !row.num_banned && !mask) return raw;
  s.x.assign(raw, raw + n);
  float* x = s.x.data();
  for (int32_t i = 0; i < row.num_bias; ++i)
    if (row.bias_ids[i] >= 0 && row.bias_ids[i] < n) x[row.bias_ids[i]] += row.bias_values[i];
  add_penalties(x, n, row);
  if (mask) apply_mask(x, n, mask, mask_words);
  if (row.num_banned) ban(x, n, row, lanes, s);
  return x;
}

// The first k keys of the order, unsorted (fewer when there are fewer finite logits).
void collect_top(const Logits& in, int64_t k, const SamplerTable& lanes, Keys& keys) {
  constexpr int64_t CHUNK = 2048;
  float floor = -FLT_MAX;
  int64_t count = 0;
  for (int64_t begin = 0; begin < in.n; begin += CHUNK) {
    keys.resize(count + CHUNK);
    const int64_t end = std::min(in.n, begin + CHUNK);
    count += lanes.collect(in, begin, end, floor, keys.data() + count);
    if (count >= 2 * k + CHUNK || (count > k && end == in.n)) {
      std::nth_element(keys.begin(), keys.begin() + (k - 1), keys.begin() + count, first);
      count = k;
      floor = key_y(keys[k - 1]);
    }
  }
  keys.resize(count);
}

uint64_t mass_of(const Keys& keys, int64_t begin, int64_t end, const SamplerTable& lanes,
                 Scratch& s) {
  s.y.resize(end - begin);
  s.masses.resize(end - begin);
  for (int64_t i = begin; i < end; ++i) s.y[i - begin] = key_y(keys[i]);
  lanes.masses(s.y.data(), end - begin, s.masses.data());
  uint64_t sum = 0;
  for (uint64_t mass : s.masses) sum += mass;
  return sum;
}

// The key at which the mass, summed in order, reaches the target; keys before it come first.
uint64_t reach(Keys& keys, uint64_t target, const SamplerTable& lanes, Scratch& s) {
  int64_t low = 0, high = static_cast<int64_t>(keys.size());
  uint64_t before = 0;
  while (high - low > 64) {
    const int64_t middle = low + (high - low) / 2;
    std::nth_element(keys.begin() + low, keys.begin() + middle, keys.begin() + high, first);
    const uint64_t mass = mass_of(keys, low, middle, lanes, s);
    if (before + mass >= target) {
      high = middle;
    } else {
      before += mass;
      low = middle;
    }
  }
  std::sort(keys.begin() + low, keys.begin() + high, first);
  mass_of(keys, low, high, lanes, s);
  for (int64_t i = low; i < high; ++i) {
    before += s.masses[i - low];
    if (before >= target) return keys[i];
  }
  return keys[high - 1];
}

Cut cut_of(const Logits& in, const SamplerRow& row, const SamplerTable& lanes, Scratch& s) {
  Cut cut{NEVER, in.n};
  const bool top_k = row.top_k > 0 && row.top_k < in.n;
  uint64_t last = 0;
  if (top_k) {
    collect_top(in, row.top_k, lanes, s.keys);
    last = *std::min_element(s.keys.begin(), s.keys.end());
  }
  if (row.top_p < 1.0) {
    const int64_t all = static_cast<int64_t>(s.keys.size());
    const uint64_t total =
        top_k ? mass_of(s.keys, 0, all, lanes, s) : lanes.mass_above(in, NEVER);
    const uint64_t target = static_cast<uint64_t>(row.top_p * static_cast<double>(total));
    if (!top_k) {  // few tokens near the top hold most of the mass
      float floor = -2.0f;
      while (floor > -64.0f && lanes.mass_above(in, floor) < target) floor *= 2.0f;
      s.keys.resize(in.n);
      s.keys.resize(lanes.collect(in, 0, in.n, floor, s.keys.data()));
    }
    last = reach(s.keys, target, lanes, s);
  }
  if (top_k || row.top_p < 1.0) cut = {key_y(last), key_token(last)};
  if (row.log_min_p > cut.y) cut = {row.log_min_p, in.n};
  return cut;
}

// ../sampling_reference.py: _log
double log_fixed(double x) {
  int exponent;
  double mantissa = std::frexp(x, &exponent);
  if (mantissa < 0.7071067811865476) mantissa *= 2.0, exponent -= 1;
  const double z = (mantissa - 1.0) / (mantissa + 1.0);
  const double square = z * z;
  double p = 0.0;
  for (int k = 23; k > 0; k -= 2) p = p * square + 1.0 / k;
  return exponent * LN2 + 2.0 * z * p;
}

void add_logprobs(const SampleArgs& a, int64_t i, float top, int64_t num_top,
                  const SamplerTable& lanes, Scratch& s) {
  const float* raw = a.logits + i * a.vocab;
  const uint64_t total = lanes.mass_above({raw, a.vocab, top, 1.0f}, NEVER);
  const double log_z = log_fixed(static_cast<double>(total)) - MASS_BITS * LN2;
  const auto logprob = [&](int64_t token) {
    return (static_cast<double>(raw[token]) - static_cast<double>(top)) - log_z;
  };
  a.logprob[i] = logprob(a.token[i]);
  if (num_top <= 0) return;
  collect_top({raw, a.vocab, 0.0f, 1.0f}, num_top, lanes, s.keys);
  std::sort(s.keys.begin(), s.keys.end(), first);
  for (size_t k = 0; k < s.keys.size(); ++k) {
    a.top_token[i * a.top_columns + k] = static_cast<int32_t>(key_token(s.keys[k]));
    a.top_logprob[i * a.top_columns + k] = logprob(key_token(s.keys[k]));
  }
}

void sample_row(const SampleArgs& a, int64_t i, const SamplerTable& lanes) {
  static thread_local Scratch s;
  s.keys.clear();
  const SamplerRow& row = *a.params[i];
  const float* raw = a.logits + i * a.vocab;
  const int64_t n = std::min<int64_t>(a.vocab, std::max(row.vocab_size, 0));
  float raw_top;
  if (!lanes.scan(raw, a.vocab, &raw_top)) {
    a.fault[i] = NOT_FINITE;
    return;
  }
  const int32_t* mask = a.mask ? a.mask[i] : nullptr;
  const float* x = process(raw, n, row, mask, mask ? a.mask_words[i] : 0, lanes, s);
  float top = raw_top;
  if (x != raw || n != a.vocab) lanes.scan(x, n, &top);
  if (n == 0 || top == NEVER) {
    a.fault[i] = NOTHING_ALLOWED;
    return;
  }
  int64_t token = lanes.find(x, n, top);
  if (row.inv_temperature > 0.0f) {
    const Logits in{x, n, top, row.inv_temperature};
    const Cut cut = cut_of(in, row, lanes, s);
    token = lanes.draw(in, cut, row.seed, static_cast<uint64_t>(a.position[i]), token);
  }
  a.token[i] = static_cast<int32_t>(token);
  if (row.num_top >= 0)
    add_logprobs(a, i, raw_top, std::min<int64_t>(row.num_top, a.top_columns), lanes, s);
}

template <class T>
T* at(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace

void sample(const SampleArgs& args) {
  const SamplerTable& lanes = *chosen_table()->sampler;
  run_rows(args.rows, args.vocab, [&](int64_t row) { sample_row(args, row, lanes); });
}

void bind_sampler(nanobind::module_& m) {
  using Address = uintptr_t;
  m.def(
      "sample",
      [](Address logits, Address params, Address position, Address mask, Address mask_words,
         Address token, Address fault, Address logprob, Address top_token, Address top_logprob,
         int64_t rows, int64_t vocab, int64_t top_columns) {
        sample({at<const float>(logits), at<const SamplerRow* const>(params),
                at<const int64_t>(position), at<const int32_t* const>(mask),
                at<const int32_t>(mask_words), at<int32_t>(token), at<uint8_t>(fault),
                at<double>(logprob), at<int32_t>(top_token), at<double>(top_logprob), rows, vocab,
                top_columns});
      },
      nanobind::call_guard<nanobind::gil_scoped_release>());
  m.def("gumbel", [](uint64_t seed, uint64_t position, int64_t n, Address out) {
    chosen_table()->sampler->noise(seed, position, n, at<float>(out));
  });
}

}  // namespace coppice
