#include "rows.h"

#include <algorithm>
#include <stdexcept>

namespace coppice {

void require(bool fine, const char* message) {
  if (!fine) throw std::out_of_range(message);
}

// Every slot a row writes or reads must lie in a page the sequence owns.
void check_slots(const RowArrays& in, const Cache& cache) {
  for (int64_t i = 0; i < in.rows; ++i) {
    const int64_t sequence = in.sequence[i], slot = in.slot[i];
    require(sequence >= 0 && sequence < in.sequences, "row names a sequence that is not there");
    require(slot >= 0 && slot / cache.page_size < in.max_pages, "row's slot is beyond its pages");
    const int64_t page = in.page_table[sequence * in.max_pages + slot / cache.page_size];
    require(page >= 0 && page < cache.pages, "row's slot has no page");
    require(in.parent[i] < i, "row stands before its parent");
    require(in.parent[i] < 0 || in.sequence[in.parent[i]] == sequence,
            "row's parent is of another sequence");
  }
}

void check_prefix(const RowArrays& in, const Cache& cache) {
  for (int64_t s = 0; s < in.sequences; ++s) {
    const int64_t pages = (in.prefix_len[s] + cache.page_size - 1) / cache.page_size;
    require(in.prefix_len[s] >= 0 && pages <= in.max_pages, "prefix is longer than its pages");
    for (int64_t p = 0; p < pages; ++p) {
      const int64_t page = in.page_table[s * in.max_pages + p];
      require(page >= 0 && page < cache.pages, "prefix lacks a page");
    }
  }
}

void check_positions(const RowArrays& in, int64_t max_position) {
  for (int64_t i = 0; i < in.rows; ++i)
    require(in.position[i] >= 0 && in.position[i] < max_position,
            "position is beyond the rotary table");
}

void Tiles::lay(const RowArrays& in, int64_t group) {
  const int64_t most = std::max<int64_t>(1, TILE_QUERIES / group);
  index.resize(in.rows);
  plain.resize(in.rows);
  tiles.clear();
  for (int64_t i = 0; i < in.rows; ++i) {
    const int32_t parent = in.parent[i], prefix = in.prefix_len[in.sequence[i]];
    index[i] = parent < 0 ? prefix : index[parent] + 1;
    plain[i] = in.slot[i] == index[i] && (parent < 0 || plain[parent]);
    if (!tiles.empty()) {
      Tile& tile = tiles.back();
      if (in.sequence[i] == in.sequence[tile.first] && tile.count < most) {
        ++tile.count;
        tile.chain = tile.chain && plain[i] && parent == i - 1;
        continue;
      }
    }
    tiles.push_back({static_cast<int32_t>(i), 1, prefix, plain[i] != 0});
  }
}

}  // namespace coppice
