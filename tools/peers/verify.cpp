// What verifying drafted tokens costs llama.cpp: one forward pass of k rows of one sequence
// over a filled context, logits for all of them, then taken back.
// Usage: verify MODEL.gguf THREADS CONTEXT ROWS...   Prints median seconds, one line each.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "llama.h"

namespace {

constexpr int MOST_REPEATS = 9, LEAST_REPEATS = 3;
constexpr double ENOUGH_S = 0.8;

double run(llama_context* ctx, int first, int rows, int32_t vocab) {
  llama_batch batch = llama_batch_init(rows, 0, 1);
  batch.n_tokens = rows;
  for (int i = 0; i < rows; ++i) {
    batch.token[i] = std::rand() % vocab;
    batch.pos[i] = first + i;
    batch.n_seq_id[i] = 1;
    batch.seq_id[i][0] = 0;
    batch.logits[i] = 1;
  }
  const auto began = std::chrono::steady_clock::now();
  const int code = llama_decode(ctx, batch);
  llama_synchronize(ctx);
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
  llama_batch_free(batch);
  if (code != 0) {
    std::fprintf(stderr, "llama_decode gave %d\n", code);
    std::exit(1);
  }
  return took.count();
}

double median_seconds(llama_context* ctx, int context, int rows, int32_t vocab) {
  std::vector<double> seconds;
  double total = 0;
  for (int i = 0; i <= MOST_REPEATS; ++i) {
    const double s = run(ctx, context, rows, vocab);
    llama_memory_seq_rm(llama_get_memory(ctx), 0, context, -1);
    if (i == 0) continue;  // warms up
    seconds.push_back(s);
    total += s;
    if (i >= LEAST_REPEATS && total > ENOUGH_S) break;
  }
  std::nth_element(seconds.begin(), seconds.begin() + seconds.size() / 2, seconds.end());
  return seconds[seconds.size() / 2];
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 5) {
    std::fprintf(stderr, "usage: %s MODEL.gguf THREADS CONTEXT ROWS...\n", argv[0]);
    return 2;
  }
  const int threads = std::atoi(argv[2]), context = std::atoi(argv[3]);
  llama_backend_init();
  llama_model* model = llama_model_load_from_file(argv[1], llama_model_default_params());
  llama_context_params params = llama_context_default_params();
  params.n_ctx = context + 256;
  params.n_batch = params.n_ubatch = 512;
  params.n_threads = params.n_threads_batch = threads;
  llama_context* ctx = model ? llama_init_from_model(model, params) : nullptr;
  if (ctx == nullptr) {
    std::fprintf(stderr, "cannot load %s\n", argv[1]);
    return 1;
  }
  const int32_t vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
  for (int at = 0; at < context; at += 32) run(ctx, at, std::min(32, context - at), vocab);
  for (int i = 4; i < argc; ++i)
    std::printf("%.9f\n", median_seconds(ctx, context, std::atoi(argv[i]), vocab));
  llama_free(ctx);
  llama_model_free(model);
  return 0;
}
