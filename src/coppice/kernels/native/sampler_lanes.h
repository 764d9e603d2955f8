// The sampler's passes over a vocabulary, sixteen tokens at a time.
//
// Included by isa.cpp. The arithmetic repeats ../noise.py and ../sampling_reference.py
// operation by operation, each rounded once (no fused multiply-add), so that results are
// equal bit for bit on every instruction set and in numpy.
#pragma once

#include "sampler.h"
#include "vec.h"

namespace coppice {
namespace COPPICE_ISA {

COPPICE_INLINE float minus_infinity() { return -__builtin_inff(); }

COPPICE_INLINE vf every(float x) { return splat(x).v[0]; }

COPPICE_INLINE V16 load_tail(const float* p, int64_t n) {
  float s[16];
  for (int i = 0; i < 16; ++i) s[i] = minus_infinity();
  memcpy(s, p, n * sizeof(float));
  return load16(s);
}
COPPICE_INLINE V16 load_at(const float* x, int64_t i, int64_t n) {
  return i + 16 <= n ? load16(x + i) : i < n ? load_tail(x + i, n - i) : splat(minus_infinity());
}
COPPICE_INLINE V16 scaled(const Logits& in, int64_t i) {
  return (load_at(in.x, i, in.n) - splat(in.top)) * splat(in.inv_temperature);
}

COPPICE_INLINE bool any(vi mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__) && !defined(COPPICE_WIDE)
  return _mm256_movemask_ps((__m256)mask) != 0;
#elif defined(__SSE2__) && !defined(COPPICE_WIDE)
  return _mm_movemask_ps((__m128)mask) != 0;
#else
  int32_t all = 0;
  for (int i = 0; i < W; ++i) all |= mask[i];
  return all != 0;
#endif
}
COPPICE_INLINE vf choose(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }
COPPICE_INLINE bool any_at_least(V16 a, V16 b) {
  vi found = {};
  COPPICE_EACH found |= (vi)(a.v[i] >= b.v[i]);
  return any(found);
}

// Highest value of x; false when there is a NaN or +inf.
static bool sampler_scan(const float* x, int64_t n, float* top) {
  const V16 limit = splat(__builtin_inff());
  V16 best = splat(minus_infinity());
  vi bad = {};
  for (int64_t i = 0; i < n; i += 16) {
    const V16 value = load_at(x, i, n);
    COPPICE_EACH bad |= ~(vi)(value.v[i] < limit.v[i]);
    best = max(best, value);
  }
  *top = max_lane(best);
  return !any(bad);
}

// First index holding value (of a finite row that has it).
static int64_t sampler_find(const float* x, int64_t n, float value) {
  const V16 wanted = splat(value);
  for (int64_t i = 0; i < n; i += 16) {
    if (!any_at_least(load_at(x, i, n), wanted)) continue;
    for (int64_t k = i; k < n; ++k)
      if (x[k] >= value) return k;
  }
  return -1;
}

// ../noise.py: exp
COPPICE_INLINE V16 sampler_exp(V16 x) {
  const V16 floor = splat(-64.0f), magic = splat(12582912.0f);
  x = where_less(x, floor, floor, x);
  const V16 n = (x * splat(1.44269504f) + magic) - magic;
  const V16 r = (x - n * splat(0.693359375f)) - n * splat(-2.12194440e-4f);
  V16 p = splat(0.0013933733571320772f);
  p = p * r + splat(0.008363235741853714f);
  p = p * r + splat(0.041666463017463684f);
  p = p * r + splat(0.16666576266288757f);
  p = p * r + splat(0.5f);
  V16 y = (r * r) * p + r + splat(1.0f);
  COPPICE_EACH y.v[i] = (vf)((vi)y.v[i] + (__builtin_convertvector(n.v[i], vi) << 23));
  return y;
}

constexpr double MASS_SCALE = 17592186044416.0;    // 2^44
constexpr double ROUND_MAGIC = 4503599627370496.0;  // 2^52: adding it rounds to an integer

// Masses of sixteen values e in [0, 1], biased by the bits of ROUND_MAGIC.
COPPICE_INLINE void add_biased_masses(V16 e, uint64_t* sum) {
  float s[16];
  store16(s, e);
  for (int i = 0; i < 16; ++i) {
    const double d = (double)s[i] * MASS_SCALE + ROUND_MAGIC;
    uint64_t bits;
    memcpy(&bits, &d, 8);
    sum[i] += bits;
  }
}
COPPICE_INLINE uint64_t magic_bits() {
  const double magic = ROUND_MAGIC;
  uint64_t bits;
  memcpy(&bits, &magic, 8);
  return bits;
}

// Sum of all masses. Below -32 a mass rounds to zero, so blocks down there are passed over.
static uint64_t sampler_total_mass(const Logits& in) {
  const V16 least = splat(-32.0f);
  uint64_t sum[16] = {};
  uint64_t blocks = 0;
  for (int64_t i = 0; i < in.n; i += 16) {
    const V16 y = scaled(in, i);
    if (!any_at_least(y, least)) continue;
    add_biased_masses(sampler_exp(y), sum);
    ++blocks;
  }
  uint64_t total = 0;
  for (int i = 0; i < 16; ++i) total += sum[i];
  return total - 16 * blocks * magic_bits();
}

static void sampler_masses(const float* y, int64_t n, uint64_t* out) {
  for (int64_t i = 0; i < n; i += 16) {
    uint64_t sum[16] = {};
    add_biased_masses(sampler_exp(load_at(y, i, n)), sum);
    for (int64_t k = 0; k < 16 && i + k < n; ++k) out[i + k] = sum[k] - magic_bits();
  }
}

// Keys of tokens with y >= floor; returns how many. keys has room for n + 1.
static int64_t sampler_collect(const Logits& in, float floor, uint64_t* keys) {
  const V16 least = splat(floor);
  int64_t count = 0;
  for (int64_t i = 0; i < in.n; i += 16) {
    const V16 y = scaled(in, i);
    if (!any_at_least(y, least)) continue;
    float s[16];
    store16(s, y);
    for (int64_t k = 0; k < 16 && i + k < in.n; ++k)
      keys[count] = token_key(s[k], (int32_t)(i + k)), count += s[k] >= floor;
  }
  return count;
}

static void sampler_mass_histogram(const Logits& in, uint64_t* histogram) {
  const V16 least = splat(-32.0f), last = splat(BUCKETS - 1.0f);
  for (int b = 0; b < BUCKETS; ++b) histogram[b] = 0;
  for (int64_t i = 0; i < in.n; i += 16) {
    const V16 y = scaled(in, i);
    if (!any_at_least(y, least)) continue;
    uint64_t mass[16] = {};
    add_biased_masses(sampler_exp(y), mass);
    const V16 place = y * splat(-BUCKETS_PER_NAT);  // exact
    int32_t bucket[16];
    COPPICE_EACH {
      const vf inside = choose((vi)(place.v[i] < last.v[i]), place.v[i], last.v[i]);
      const vi whole = __builtin_convertvector(inside, vi);
      memcpy(bucket + i * W, &whole, sizeof(whole));
    }
    for (int k = 0; k < 16; ++k) histogram[bucket[k]] += mass[k] - magic_bits();
  }
}

// The highest y of each class of tokens that agree modulo 16 * num_vectors.
static void sampler_class_tops(const Logits& in, int64_t num_vectors, float* tops) {
  const int64_t stride = 16 * num_vectors;
  for (int64_t first = 0; first < stride; first += 16) {
    V16 high = splat(minus_infinity());
    for (int64_t i = first; i < in.n; i += stride) high = max(high, load_at(in.x, i, in.n));
    store16(tops + first, (high - splat(in.top)) * splat(in.inv_temperature));
  }
}

typedef uint64_t vq __attribute__((vector_size(4 * W)));

// Products of the even 32-bit lanes with m, 64 bits each.
COPPICE_INLINE vq multiply_even(vu a, uint32_t m) {
#if defined(__AVX512F__)
  return (vq)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi32((int)m));
#elif defined(__AVX2__) && !defined(COPPICE_WIDE)
  return (vq)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi32((int)m));
#elif defined(__SSE2__) && !defined(COPPICE_WIDE)
  return (vq)_mm_mul_epu32((__m128i)a, _mm_set1_epi32((int)m));
#else
  vq wide = (vq)a & 0xffffffffull;
  return wide * (uint64_t)m;
#endif
}
COPPICE_INLINE void multiply(vu a, uint32_t m, vu* high, vu* low) {
  const vq even = multiply_even(a, m), odd = multiply_even((vu)((vq)a >> 32), m);
  *low = (vu)((even & 0xffffffffull) | (odd << 32));
  *high = (vu)((even >> 32) | (odd & 0xffffffff00000000ull));
}

struct Words {
  vu w[4][NV];  // word j of counters 16 * group + lane: tokens 64 * group + 16 * j + lane
};

// ../noise.py: philox
COPPICE_INLINE Words philox(uint32_t group, uint64_t seed, uint64_t position) {
  Words out;
  COPPICE_EACH {
    vu c0, c1 = {}, c2 = {}, c3 = {};
    for (int k = 0; k < W; ++k) c0[k] = 16 * group + (uint32_t)(i * W + k);
    c1 += (uint32_t)position;
    c2 += (uint32_t)(position >> 32);
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      vu high_a, low_a, high_b, low_b;
      multiply(c0, 0xD2511F53u, &high_a, &low_a);
      multiply(c2, 0xCD9E8D57u, &high_b, &low_b);
      c0 = high_b ^ c1 ^ k0;
      c2 = high_a ^ c3 ^ k1;
      c1 = low_b;
      c3 = low_a;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    out.w[0][i] = c0, out.w[1][i] = c1, out.w[2][i] = c2, out.w[3][i] = c3;
  }
  return out;
}

COPPICE_INLINE vf log_of(vf exponent, vf f) {
  vf p = every(-0.08101558685302734f);
  p = p * f + every(0.12712307274341583f);
  p = p * f + every(-0.12972238659858704f);
  p = p * f + every(0.14202174544334412f);
  p = p * f + every(-0.16642247140407562f);
  p = p * f + every(0.20001468062400818f);
  p = p * f + every(-0.25000298023223877f);
  p = p * f + every(0.333333283662796f);
  const vf square = f * f;
  const vf tail = (square * f) * p + exponent * every(-2.12194440e-4f);
  return exponent * every(0.693359375f) + (f + (tail - every(0.5f) * square));
}
COPPICE_INLINE void split(vf x, vf* exponent, vf* f) {
  const vi bits = (vi)x;
  const vi power = (bits - 0x3F3504F3) >> 23;
  *exponent = __builtin_convertvector(power, vf);
  *f = (vf)(bits - (power << 23)) - every(1.0f);
}

// ../noise.py: exponential, then gumbel; k is the word's top 31 bits.
COPPICE_INLINE vf one_minus_uniform(vi k) {
  return (__builtin_convertvector(0x7fffffff - k, vf) + every(0.5f)) * every(0x1p-31f);
}
COPPICE_INLINE vf gumbel(vi k) {
  const vf u = (__builtin_convertvector(k, vf) + every(0.5f)) * every(0x1p-31f);
  vf exponent, f;
  split(u, &exponent, &f);
  const vi upper = k >= 0x5A82799A;
  exponent = choose(upper, every(0.0f), exponent);
  f = choose(upper, -one_minus_uniform(k), f);
  const vf waiting = -log_of(exponent, f);
  split(waiting, &exponent, &f);
  return -log_of(exponent, f);
}
COPPICE_INLINE V16 gumbel16(const Words& words, int j) {
  V16 g;
  COPPICE_EACH g.v[i] = gumbel((vi)(words.w[j][i] >> 1));
  return g;
}
// Never less than gumbel16, and cheap: -log(-log U) <= -log(1 - U), and reading a float's
// bits as a fixed-point number never overstates its logarithm. 1e-3 covers the rounding.
COPPICE_INLINE V16 gumbel_bound(const Words& words, int j) {
  V16 bound;
  COPPICE_EACH {
    const vf rest = one_minus_uniform((vi)(words.w[j][i] >> 1));
    const vf log2 = __builtin_convertvector((vi)rest, vf) * every(0x1p-23f) - every(127.0f);
    bound.v[i] = log2 * every(-0.6931472f) + every(1e-3f);
  }
  return bound;
}

static void sampler_noise(uint64_t seed, uint64_t position, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i += 64) {
    const Words words = philox((uint32_t)(i / 64), seed, position);
    for (int j = 0; j < 4; ++j) {
      const int64_t at = i + 16 * j;
      if (at < n) store_part(out + at, gumbel16(words, j), min64(16, n - at));
    }
  }
}

// One token's word, as philox computes it for a whole group.
static uint32_t word_of(uint64_t token, uint64_t seed, uint64_t position) {
  uint32_t c[4] = {(uint32_t)(token / 64 * 16 + token % 16), (uint32_t)position,
                   (uint32_t)(position >> 32), 0};
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = (uint64_t)c[0] * 0xD2511F53u, b = (uint64_t)c[2] * 0xCD9E8D57u;
    c[0] = (uint32_t)(b >> 32) ^ c[1] ^ k0;
    c[2] = (uint32_t)(a >> 32) ^ c[3] ^ k1;
    c[1] = (uint32_t)b;
    c[3] = (uint32_t)a;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c[token % 64 / 16];
}

// argmax of y + noise over a list of tokens, lowest id on a tie.
static int64_t sampler_draw_listed(const uint64_t* keys, int64_t count, uint64_t seed,
                                   uint64_t position) {
  float best = minus_infinity();
  int64_t chosen = -1;
  for (int64_t i = 0; i < count; i += 16) {
    const int64_t part = min64(16, count - i);
    float y[16] = {}, score[16];
    uint32_t word[16] = {};
    for (int64_t k = 0; k < part; ++k) {
      y[k] = key_y(keys[i + k]);
      word[k] = word_of((uint64_t)key_token(keys[i + k]), seed, position);
    }
    Words words;
    memcpy(words.w[0], word, sizeof(word));
    store16(score, load16(y) + gumbel16(words, 0));
    for (int64_t k = 0; k < part; ++k) {
      const int64_t token = key_token(keys[i + k]);
      if (score[k] > best || (score[k] == best && token < chosen)) best = score[k], chosen = token;
    }
  }
  return chosen;
}

// argmax of y + noise over tokens at or above the cut, lowest id on a tie. Noise is bounded,
// so most tokens are dropped by their logit, most others by the bound on their noise.
static int64_t sampler_draw(const Logits& in, const Cut& cut, uint64_t seed, uint64_t position,
                            int64_t top_token) {
  float best = minus_infinity(), bar;
  {
    float g[16];
    store16(g, gumbel16(philox((uint32_t)(top_token / 64), seed, position),
                        (int)(top_token % 64 / 16)));
    bar = g[top_token % 16];  // y is 0 there: a score that is certainly reached
  }
  int64_t chosen = -1;
  const V16 least = splat(cut.y), most_noise = splat(22.19f);
  for (int64_t i = 0; i < in.n; i += 64) {
    V16 y[4], high = splat(minus_infinity());
    for (int j = 0; j < 4; ++j) {
      y[j] = scaled(in, i + 16 * j);
      high = max(high, y[j]);
    }
    if (!any_at_least(high, least) || !any_at_least(high + most_noise, splat(bar))) continue;
    const Words words = philox((uint32_t)(i / 64), seed, position);
    for (int j = 0; j < 4; ++j) {
      if (!any_at_least(y[j] + gumbel_bound(words, j), splat(bar)) || !any_at_least(y[j], least))
        continue;
      float score[16], value[16];
      store16(score, y[j] + gumbel16(words, j));
      store16(value, y[j]);
      for (int k = 0; k < 16; ++k) {
        const int64_t token = i + 16 * j + k;
        const bool kept = value[k] > cut.y || (value[k] == cut.y && token <= cut.token);
        if (token < in.n && kept && score[k] > best) best = score[k], chosen = token;
      }
      if (best > bar) bar = best;
    }
  }
  return chosen;
}

static const SamplerTable sampler_table = {
    sampler_scan,           sampler_find,    sampler_class_tops, sampler_total_mass,
    sampler_mass_histogram, sampler_masses,  sampler_collect,    sampler_noise,
    sampler_draw_listed,    sampler_draw,
};

}  // namespace COPPICE_ISA
}  // namespace coppice
