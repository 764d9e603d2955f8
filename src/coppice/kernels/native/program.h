// A decoder's whole forward pass in one call: the operators of driver.h one after another,
// with one check of the rows, one hold on the threads, and buffers that stay.
//
// The operators are the very ones Python calls one by one (models/decoder.py, which says
// what a decoder is), in the same order, so both give the same bits.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "kernels.h"
#include "rows.h"

namespace coppice {

// One layer. A null norm is not there; a norm after a part comes before the sum with its input.
struct Layer {
  Packed qkv, output, gate_up, down;
  const float *before_attention, *after_attention, *before_mlp, *after_mlp;  // [hidden]
  const float *q_norm, *k_norm;                                              // as qk_norm says
  const float* cos_sin;  // [max_position, 2, half]
  int64_t half;
  int32_t window;
};

// What all layers share.
struct Shape {
  Packed embedding, head;
  const float* norm;  // [hidden]
  int64_t heads, kv_heads, head_dim, max_position;
  int qk_norm, activation;
  float eps, attention_scale, attention_softcap, embedding_scale;
};

// One step's input.
struct Step {
  const int32_t* token;  // [rows]
  RowArrays rows;
  const int32_t* wanted;  // [num_wanted] rows whose logits are asked for, each below rows
  int64_t num_wanted;
};

class Program {
 public:
  Program(const Shape& shape, std::vector<Layer> layers)
      : shape_(shape), layers_(std::move(layers)) {}

  // The KV pages of each layer, in order. Throws std::out_of_range where they do not fit.
  void use_pages(std::vector<Cache> pages);

  // Writes K and V of all rows to their slots, and logits [num_wanted, vocabulary].
  // Throws std::out_of_range, before anything is written, when an index leads nowhere.
  void run(const Step& step, float* logits);

  // The same, but of each wanted row only the token of its largest logit is told, the first
  // of equals, among the first `vocabulary`; or -NOT_FINITE or -NOTHING_ALLOWED, as the
  // sampler would say. Logits live for a piece of the vocabulary at a time.
  void run_greedy(const Step& step, int64_t vocabulary, int32_t* token);

 private:
  struct Free {
    void operator()(float* p) const;
  };
  // A buffer that only grows; what it held is gone after `room`.
  struct Buffer {
    float* room(int64_t count);
    std::unique_ptr<float, Free> memory;
    int64_t size = 0;
  };

  void check(const Step& step) const;
  const float* hidden(const Step& step);  // [num_wanted, hidden], after the last norm
  float* attend(const Layer& layer, const Cache& pages, const Step& step, const float* x);
  float* feed_forward(const Layer& layer, int64_t rows, float* x);
  void add_part(const Packed& part, const float* y, const float* after, int64_t rows, float* x);
  const float* normed(const float* x, const float* weight, int64_t rows);

  std::mutex turn_;
  Shape shape_;
  std::vector<Layer> layers_;
  std::vector<Cache> pages_;
  Tiles tiles_;
  Buffer x_, y_, inner_, gated_, q_, attended_, picked_, logits_;
};

}  // namespace coppice
