// A step's rows: what must hold before a kernel follows their indices, and how attention
// groups them. Both are the same for every layer of a model.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace coppice {

// Each throws std::out_of_range with a sentence.
void require(bool fine, const char* message);
void check_slots(const RowArrays& in, const Cache& cache);   // what a row writes is its own
void check_prefix(const RowArrays& in, const Cache& cache);  // what it reads is there
void check_positions(const RowArrays& in, int64_t max_position);

// Rows in tiles of one sequence each, of at most TILE_QUERIES query vectors.
struct Tiles {
  std::vector<int32_t> index;  // [rows] a row's logical index
  std::vector<char> plain;     // [rows] slot == logical index for it and its ancestors
  std::vector<Tile> tiles;

  // `group` query heads share a KV head. Slots must have been checked.
  void lay(const RowArrays& in, int64_t group);
};

}  // namespace coppice
