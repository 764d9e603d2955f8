// Cuts operators into tasks and runs them on the pool with the chosen instruction set.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "kernels.h"

namespace coppice {

std::vector<std::string> available();
std::string isa();
void set_isa(const std::string& name);  // throws std::invalid_argument
int num_threads();
void set_num_threads(int threads);

void linear(LinearArgs args);
void pack(const PackArgs& args);
void unpack(const PackArgs& args);
void gather(const LinearArgs& args, const int32_t* token);
void norm(const NormArgs& args);
void gate(const GateArgs& args);
void rope(const RopeArgs& args, int64_t max_position);
void attention(AttentionArgs args);

// For sampler.cpp: the chosen instruction set, and rows of `row_work` elements as tasks.
const Table* chosen_table();
void run_rows(int64_t rows, int64_t row_work, const std::function<void(int64_t row)>& f);

double read_probe(const float* memory, int64_t count, int rounds);  // bytes per second
double fma_probe(int64_t rounds);                                   // flops per second

}  // namespace coppice
