// Cuts operators into tasks and runs them on the pool with the chosen instruction set.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "codes.h"
#include "kernels.h"
#include "parallel.h"
#include "rows.h"

namespace coppice {

std::vector<std::string> available();
std::string isa();
void set_isa(const std::string& name);  // throws std::invalid_argument

// out [rows, n] = x [rows, k] W^T + bias (+ residual [rows, n], which may be null or out).
void linear(const Packed& w, const float* x, int64_t rows, const float* residual, float* out);
void quantized_linear(const Packed& w, const float* x, int64_t rows, const float* residual,
                      float* out);  // of linear, where rows become codes
void pack(const PackArgs& args);
void pack(const PackCodesArgs& args);
void unpack(const Packed& w, float* out);  // [n, k]
// Rows of W as float32 [rows, k]; throws std::out_of_range.
void gather(const Packed& w, const int32_t* token, int64_t rows, float* out);
void norm(const NormArgs& args);
void gate(const GateArgs& args);

// Their rows must have been checked (rows.h).
void rope(const RopeArgs& args);
void attention(AttentionArgs args, const Tiles& tiles);

// For sampler.cpp: the chosen instruction set, and rows of `row_work` elements as tasks.
const Table* chosen_table();
void run_rows(int64_t rows, int64_t row_work, const std::function<void(int64_t row)>& f);

double read_probe(const float* memory, int64_t count, int rounds);  // bytes per second
double fma_probe(int64_t rounds);                                   // flops per second
double int8_probe(int64_t rounds);  // int8 operations per second, as quantized layers do them
// Best rate of several runs of a task of so many operations, on every thread at once.
double probe_tasks(double operations, const std::function<void()>& task);

}  // namespace coppice
