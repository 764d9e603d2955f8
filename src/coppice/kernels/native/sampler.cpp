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

constexpr float NEVER = -std::numeric_limits<float>::infinity();
constexpr double LN2 = 0.6931471805599453;
constexpr int MASS_BITS = 44;

using Keys = std::vector<uint64_t>;
const auto first = std::greater<uint64_t>();

struct Scratch {
  std::vector<float> x, y, saved, noise, scores;
  Keys keys, room;
  std::vector<uint64_t> masses;
  uint64_t histogram[BUCKETS];
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

void collect(const Logits& in, float floor, const SamplerTable& lanes, Scratch& s) {
  if (s.room.size() <= static_cast<size_t>(in.n)) s.room.resize(in.n + 1);
  const int64_t count = lanes.collect(in, floor, s.room.data());
  s.keys.assign(s.room.begin(), s.room.begin() + count);
}

// The first k keys of the order, unsorted (fewer when there are fewer finite logits).
void collect_top(const Logits& in, int64_t k, const SamplerTable& lanes, Scratch& s) {
  // Of four times as many classes of tokens, the k-th highest top is a bound: k tokens at
  // least reach it, and seldom many more.
  const int64_t num_vectors = (4 * k + 15) / 16;
  float floor = -FLT_MAX;
  if (k < in.n / 8) {
    s.y.resize(16 * num_vectors);
    lanes.class_tops(in, num_vectors, s.y.data());
    std::nth_element(s.y.begin(), s.y.begin() + (k - 1), s.y.end(), std::greater<float>());
    floor = std::max(floor, s.y[k - 1]);
  }
  collect(in, floor, lanes, s);
  if (static_cast<int64_t>(s.keys.size()) <= k) return;
  std::nth_element(s.keys.begin(), s.keys.begin() + (k - 1), s.keys.end(), first);
  s.keys.resize(k);
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

// The key at which the mass, summed in order from keys[low] on, reaches the target. Keys
// before low come first in the order and weigh `before`.
uint64_t reach(Keys& keys, int64_t low, uint64_t before, uint64_t target,
               const SamplerTable& lanes, Scratch& s) {
  int64_t high = static_cast<int64_t>(keys.size());
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

// The last key that top_p keeps of the whole vocabulary; s.keys gets it and all before it.
uint64_t last_of_mass(const Logits& in, double top_p, const SamplerTable& lanes, Scratch& s) {
  lanes.mass_histogram(in, s.histogram);
  uint64_t total = 0, before = 0;
  for (const uint64_t mass : s.histogram) total += mass;
  const auto target = static_cast<uint64_t>(top_p * static_cast<double>(total));
  int bucket = 0;
  while (bucket < BUCKETS - 1 && before + s.histogram[bucket] < target)
    before += s.histogram[bucket++];
  const float upper = static_cast<float>(-bucket) / BUCKETS_PER_NAT;
  collect(in, bucket == BUCKETS - 1 ? -FLT_MAX : upper - 1.0f / BUCKETS_PER_NAT, lanes, s);
  const auto split = std::partition(s.keys.begin(), s.keys.end(),
                                    [&](uint64_t key) { return key_y(key) > upper; });
  return reach(s.keys, split - s.keys.begin(), before, target, lanes, s);
}

// Steps top_k and top_p, and min_p of what they kept, into s.keys. False, with nothing listed,
// where neither is on.
bool list_kept(const Logits& in, const SamplerRow& row, const SamplerTable& lanes, Scratch& s) {
  const bool top_k = row.top_k > 0 && row.top_k < in.n;
  if (!top_k && row.top_p >= 1.0) return false;
  if (top_k) collect_top(in, row.top_k, lanes, s);
  uint64_t last = 0;
  if (row.top_p < 1.0 && top_k) {
    const uint64_t total = mass_of(s.keys, 0, static_cast<int64_t>(s.keys.size()), lanes, s);
    const auto target = static_cast<uint64_t>(row.top_p * static_cast<double>(total));
    last = reach(s.keys, 0, 0, target, lanes, s);
  } else if (row.top_p < 1.0) {
    last = last_of_mass(in, row.top_p, lanes, s);
  }
  const auto dropped = [&](uint64_t key) { return key < last || key_y(key) < row.log_min_p; };
  s.keys.erase(std::remove_if(s.keys.begin(), s.keys.end(), dropped), s.keys.end());
  return true;
}

// Steps top_k, top_p, min_p and the choice.
int64_t draw(const Logits& in, const SamplerRow& row, int64_t position, int64_t top_token,
             const SamplerTable& lanes, Scratch& s) {
  const uint64_t at = static_cast<uint64_t>(position);
  if (!list_kept(in, row, lanes, s))
    return lanes.draw(in, {row.log_min_p, in.n}, row.seed, at, top_token);
  const int64_t count = static_cast<int64_t>(s.keys.size());
  if (count <= in.n / 8) return lanes.draw_listed(s.keys.data(), count, row.seed, at);
  const uint64_t cut = *std::min_element(s.keys.begin(), s.keys.end());
  return lanes.draw(in, {key_y(cut), key_token(cut)}, row.seed, at, top_token);
}

// What the argmax of a draw is taken over, y + noise or the logits themselves, in s.scores;
// the largest of them.
float score(const Logits& in, const SamplerRow& row, int64_t position, const SamplerTable& lanes,
            Scratch& s) {
  s.scores.assign(in.n, NEVER);
  if (row.inv_temperature == 0.0f) {
    std::copy_n(in.x, in.n, s.scores.begin());
    return in.top;
  }
  s.noise.resize(in.n);
  lanes.noise(row.seed, static_cast<uint64_t>(position), in.n, s.noise.data());
  float best = NEVER;
  const auto keep = [&](int64_t token) {
    const float y = (in.x[token] - in.top) * row.inv_temperature;
    if (y < row.log_min_p) return;
    best = std::max(best, s.scores[token] = y + s.noise[token]);
  };
  if (list_kept(in, row, lanes, s))
    for (const uint64_t key : s.keys) keep(key_token(key));
  else
    for (int64_t token = 0; token < in.n; ++token) keep(token);
  return best;
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
  const uint64_t total = lanes.total_mass({raw, a.vocab, top, 1.0f});
  const double log_z = log_fixed(static_cast<double>(total)) - MASS_BITS * LN2;
  const auto logprob = [&](int64_t token) {
    return (static_cast<double>(raw[token]) - static_cast<double>(top)) - log_z;
  };
  a.logprob[i] = logprob(a.token[i]);
  if (num_top <= 0) return;
  collect_top({raw, a.vocab, 0.0f, 1.0f}, num_top, lanes, s);
  std::sort(s.keys.begin(), s.keys.end(), first);
  for (size_t k = 0; k < s.keys.size(); ++k) {
    a.top_token[i * a.top_columns + k] = static_cast<int32_t>(key_token(s.keys[k]));
    a.top_logprob[i * a.top_columns + k] = logprob(key_token(s.keys[k]));
  }
}

// The first `width` tokens by score, with the logarithms of their shares of all e^score.
void rank_row(const RankArgs& a, int64_t i, const SamplerTable& lanes) {
  static thread_local Scratch s;
  s.keys.clear();
  std::fill_n(a.token + i * a.width, a.width, -1);
  std::fill_n(a.share + i * a.width, a.width, NEVER);
  const SamplerRow& row = *a.params[i];
  const float* raw = a.logits + i * a.vocab;
  const int64_t n = std::min<int64_t>(a.vocab, std::max(row.vocab_size, 0));
  float top;
  if (!lanes.scan(raw, a.vocab, &top)) return;
  const float* x = process(raw, n, row, nullptr, 0, lanes, s);
  lanes.scan(x, n, &top);
  if (n == 0 || top == NEVER) return;
  const Logits in{x, n, top, row.inv_temperature};
  const float best = score(in, row, a.position[i], lanes, s);
  const Logits scores{s.scores.data(), n, best, a.sharpness};
  const double total = log_fixed(static_cast<double>(lanes.total_mass(scores))) - MASS_BITS * LN2;
  collect_top(scores, std::min(a.width, n), lanes, s);
  std::sort(s.keys.begin(), s.keys.end(), first);
  for (size_t k = 0; k < s.keys.size(); ++k) {
    a.token[i * a.width + k] = static_cast<int32_t>(key_token(s.keys[k]));
    a.share[i * a.width + k] = static_cast<float>(key_y(s.keys[k]) - total);
  }
}

void sample_row(const SampleArgs& a, int64_t i, const SamplerTable& lanes) {
  static thread_local Scratch s;
  s.keys.clear();
  a.token[i] = -1;  // until one is found
  a.fault[i] = 0;
  a.logprob[i] = 0.0;
  std::fill_n(a.top_token + i * a.top_columns, a.top_columns, -1);
  std::fill_n(a.top_logprob + i * a.top_columns, a.top_columns, 0.0);
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
    token = draw(in, row, a.position[i], token, lanes, s);
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

void rank(const RankArgs& args) {
  const SamplerTable& lanes = *chosen_table()->sampler;
  run_rows(args.rows, args.vocab, [&](int64_t row) { rank_row(args, row, lanes); });
}

void bind_sampler(nanobind::module_& m) {
  using Address = uintptr_t;
  m.def(
      "rank",
      [](Address logits, Address params, Address position, Address token, Address share,
         float sharpness, int64_t rows, int64_t vocab, int64_t width) {
        rank({at<const float>(logits), at<const SamplerRow* const>(params),
              at<const int64_t>(position), at<int32_t>(token), at<float>(share), sharpness, rows,
              vocab, width});
      },
      nanobind::call_guard<nanobind::gil_scoped_release>());
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
