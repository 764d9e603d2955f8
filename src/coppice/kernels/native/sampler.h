// What the sampler's instruction-set builds offer, and its entry points.
#pragma once

#include <cstdint>
#include <cstring>

namespace coppice {

// Why a row has no token: a NaN or infinite logit; every token banned.
constexpr uint8_t NOT_FINITE = 1, NOTHING_ALLOWED = 2;

// A row of processed logits; y = (x - top) * inv_temperature.
struct Logits {
  const float* x;
  int64_t n;
  float top, inv_temperature;
};

// Tokens are ordered by y descending, then id ascending; kept up to and with this one.
struct Cut {
  float y;
  int64_t token;
};

// Bucket b of a mass histogram holds y in (-(b + 1) / 32, -b / 32]; the last one the rest.
constexpr int BUCKETS = 1024;
constexpr float BUCKETS_PER_NAT = 32.0f;

struct SamplerTable {
  bool (*scan)(const float* x, int64_t n, float* top);
  int64_t (*find)(const float* x, int64_t n, float value);
  void (*class_tops)(const Logits&, int64_t num_vectors, float* tops);
  uint64_t (*total_mass)(const Logits&);
  void (*mass_histogram)(const Logits&, uint64_t* histogram);
  void (*masses)(const float* y, int64_t n, uint64_t* out);
  int64_t (*collect)(const Logits&, float floor, uint64_t* keys);
  void (*noise)(uint64_t seed, uint64_t position, int64_t n, float* out);
  int64_t (*draw_listed)(const uint64_t* keys, int64_t count, uint64_t seed, uint64_t position);
  int64_t (*draw)(const Logits&, const Cut&, uint64_t seed, uint64_t position, int64_t top_token);
};

// Larger keys come first in the order: y in the high half, the inverted id in the low one.
static inline uint64_t token_key(float y, int32_t token) {
  const float canonical = y + 0.0f;  // -0 becomes +0, they are equal
  uint32_t bits;
  memcpy(&bits, &canonical, 4);
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return (uint64_t)bits << 32 | (0xffffffffu - (uint32_t)token);
}
static inline int64_t key_token(uint64_t key) { return 0xffffffffu - (uint32_t)key; }
static inline float key_y(uint64_t key) {
  uint32_t bits = (uint32_t)(key >> 32);
  bits = bits & 0x80000000u ? bits & 0x7fffffffu : ~bits;
  float y;
  memcpy(&y, &bits, 4);
  return y;
}

// One sequence's parameters: ../sampling.py ROW, field by field.
struct SamplerRow {
  uint64_t seed;
  double top_p;
  const int32_t* bias_ids;
  const float* bias_values;
  const int32_t* banned_ids;
  const int32_t* seen_ids;
  const int32_t* seen_counts;
  const int32_t* seen_prompt;
  float inv_temperature, log_min_p, repetition, presence, frequency;
  int32_t top_k, vocab_size, num_top, num_bias, num_banned, num_seen, reserved;
};
static_assert(sizeof(SamplerRow) == 112, "ROW in sampling.py has the same layout");

struct SampleArgs {
  const float* logits;             // [rows, vocab]
  const SamplerRow* const* params; // [rows]
  const int64_t* position;         // [rows]
  const int32_t* const* mask;      // [rows] or null; each a bitmask or null
  const int32_t* mask_words;       // [rows]
  int32_t* token;                  // [rows]
  uint8_t* fault;                  // [rows]
  double* logprob;                 // [rows]
  int32_t* top_token;              // [rows, top_columns]
  double* top_logprob;             // [rows, top_columns]
  int64_t rows, vocab, top_columns;
};

struct RankArgs {
  const float* logits;             // [rows, vocab]
  const SamplerRow* const* params; // [rows]
  const int64_t* position;         // [rows]
  int32_t* token;                  // [rows, width], -1 where there is none
  float* share;                    // [rows, width]
  float sharpness;                 // multiplies scores before their shares are taken
  int64_t rows, vocab, width;
};

void sample(const SampleArgs& args);
void rank(const RankArgs& args);

}  // namespace coppice
