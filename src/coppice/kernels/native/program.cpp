#include "program.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <utility>

#include "driver.h"
#include "quantized_table.h"
#include "sampler.h"

namespace coppice {
namespace {

void scale(float* x, int64_t rows, int64_t n, float factor) {
  if (factor == 1.0f) return;
  parallel_rows(rows, n, 0, [&](int64_t row, float*) {
    float* to = x + row * n;
    for (int64_t j = 0; j < n; ++j) to[j] *= factor;
  });
}

void add(float* x, const float* y, int64_t rows, int64_t n) {
  parallel_rows(rows, n, 0, [&](int64_t row, float*) {
    float* to = x + row * n;
    const float* from = y + row * n;
    for (int64_t j = 0; j < n; ++j) to[j] += from[j];
  });
}

// Rows `wanted` of x [*, n], in order.
void pick(const float* x, const int32_t* wanted, int64_t count, int64_t n, float* out) {
  for (int64_t i = 0; i < count; ++i)
    std::memcpy(out + i * n, x + wanted[i] * n, n * sizeof(float));
}

constexpr int64_t HEAD_PIECE = 16384;  // output features of the head at a time

// The largest logit of a row that is looked at piece by piece.
struct Largest {
  float top = -std::numeric_limits<float>::infinity();
  int64_t token = -1;
  bool finite = true;

  void look(const float* x, int64_t n, int64_t first, int64_t vocabulary) {
    const SamplerTable& lanes = *chosen_table()->sampler;
    float most;
    finite = lanes.scan(x, n, &most) && finite;
    const int64_t allowed = std::min(n, vocabulary - first);
    if (!finite || allowed <= 0) return;
    if (allowed < n) lanes.scan(x, allowed, &most);
    if (most > top) {
      top = most;
      token = first + lanes.find(x, allowed, most);
    }
  }

  int32_t answer() const {
    return !finite ? -NOT_FINITE : token < 0 ? -NOTHING_ALLOWED : static_cast<int32_t>(token);
  }
};

}  // namespace

void Program::Free::operator()(float* p) const { std::free(p); }

float* Program::Buffer::room(int64_t count) {
  if (count > size) {
    const int64_t bytes = (count * 4 + 4095) / 4096 * 4096;
    memory.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    size = memory ? bytes / 4 : 0;
    if (!memory) throw std::bad_alloc();
  }
  return memory.get();
}

void Program::use_pages(std::vector<Cache> pages) {
  require(!pages.empty() && pages.size() == layers_.size(), "every layer needs its pages");
  const Cache& first = pages.front();
  for (const Cache& p : pages) {
    require(p.kv_heads == shape_.kv_heads && p.head_dim == shape_.head_dim,
            "the pages are of another model");
    require(p.pages == first.pages && p.page_size == first.page_size,
            "the layers differ in their pages");
  }
  const std::lock_guard<std::mutex> turn(turn_);
  pages_ = std::move(pages);
}

void Program::check(const Step& step) const {
  require(!pages_.empty(), "the program has no pages yet");
  check_positions(step.rows, shape_.max_position);
  check_slots(step.rows, pages_.front());
  check_prefix(step.rows, pages_.front());
  for (int64_t i = 0; i < step.num_wanted; ++i)
    require(step.wanted[i] >= 0 && step.wanted[i] < step.rows.rows, "a wanted row is not there");
}

const float* Program::normed(const float* x, const float* weight, int64_t rows) {
  if (!weight) return x;
  const int64_t n = shape_.embedding.k;
  float* y = y_.room(rows * n);
  norm({x, weight, y, rows, n, shape_.eps});
  return y;
}

// x += part(y), the part's output normed first where the layer has a norm after it.
void Program::add_part(const Packed& part, const float* y, const float* after, int64_t rows,
                       float* x) {
  if (!after) return linear(part, y, rows, x, x);
  float* out = inner_.room(rows * part.n);
  linear(part, y, rows, nullptr, out);
  norm({out, after, y_.room(rows * part.n), rows, part.n, shape_.eps});
  add(x, y_.memory.get(), rows, part.n);
}

// Attention of all rows over the cache, after writing their own K and V: [rows, heads * dim].
float* Program::attend(const Layer& layer, const Cache& pages, const Step& step,
                       const float* x) {
  const int64_t rows = step.rows.rows, width = shape_.heads * shape_.head_dim;
  float* qkv = inner_.room(rows * layer.qkv.n);
  linear(layer.qkv, normed(x, layer.before_attention, rows), rows, nullptr, qkv);
  float* q = q_.room(rows * width);
  rope({qkv, layer.cos_sin, layer.q_norm, layer.k_norm, q, pages, step.rows, shape_.heads,
        layer.half, shape_.qk_norm, shape_.eps});
  float* out = attended_.room(rows * width);
  attention({q, nullptr, out, pages, step.rows, nullptr, nullptr, 0, shape_.heads,
             shape_.attention_scale, shape_.attention_softcap, layer.window},
            tiles_);
  return out;
}

float* Program::feed_forward(const Layer& layer, int64_t rows, float* x) {
  const int64_t intermediate = layer.down.k;
  float* gate_up = inner_.room(rows * layer.gate_up.n);
  linear(layer.gate_up, normed(x, layer.before_mlp, rows), rows, nullptr, gate_up);
  float* gated = gated_.room(rows * intermediate);
  gate({gate_up, gated, rows, intermediate, shape_.activation});
  add_part(layer.down, gated, layer.after_mlp, rows, x);
  return x;
}

const float* Program::hidden(const Step& step) {
  check(step);
  int64_t rows = step.rows.rows;
  const int64_t hidden = shape_.embedding.k;
  float* x = x_.room(rows * hidden);
  gather(shape_.embedding, step.token, rows, x);
  scale(x, rows, hidden, shape_.embedding_scale);
  tiles_.lay(step.rows, shape_.heads / shape_.kv_heads);
  for (size_t i = 0; i < layers_.size(); ++i) {
    const float* y = attend(layers_[i], pages_[i], step, x);
    if (i + 1 == layers_.size() && step.num_wanted < rows) {
      // K and V are in place: from here on, rows stand alone.
      const int64_t width = shape_.heads * shape_.head_dim;
      float* some = picked_.room(step.num_wanted * (hidden + width));
      pick(x, step.wanted, step.num_wanted, hidden, some);
      pick(y, step.wanted, step.num_wanted, width, some + step.num_wanted * hidden);
      rows = step.num_wanted;
      x = some;
      y = some + rows * hidden;
    }
    add_part(layers_[i].output, y, layers_[i].after_attention, rows, x);
    feed_forward(layers_[i], rows, x);
  }
  return normed(x, shape_.norm, rows);
}

void Program::run(const Step& step, float* logits) {
  const std::lock_guard<std::mutex> turn(turn_);
  const Region region;
  linear(shape_.head, hidden(step), step.num_wanted, nullptr, logits);
}

void Program::run_greedy(const Step& step, int64_t vocabulary, int32_t* token) {
  const std::lock_guard<std::mutex> turn(turn_);
  const Region region;
  const float* x = hidden(step);
  std::vector<Largest> found(step.num_wanted);
  for (int64_t first = 0; first < shape_.head.n;) {
    const Packed piece = output_features(shape_.head, first, HEAD_PIECE);
    float* logits = logits_.room(step.num_wanted * piece.n);
    linear(piece, x, step.num_wanted, nullptr, logits);
    parallel_rows(step.num_wanted, piece.n, 0, [&](int64_t row, float*) {
      found[row].look(logits + row * piece.n, piece.n, first, vocabulary);
    });
    first += piece.n;
  }
  for (int64_t i = 0; i < step.num_wanted; ++i) token[i] = found[i].answer();
}

}  // namespace coppice
