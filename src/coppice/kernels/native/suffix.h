// A text and where its recent tokens were seen before: the suffix trie of speculation.
//
// Of the trie of all n-grams only some levels are kept. A node of a level is found by the hash
// of its path and holds its occurrences, newest first; what follows them is the text itself, so
// nothing below a node is stored. Appending is one insertion a level, a full text forgets its
// oldest token, and ../suffix_reference.py is the same in Python.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace coppice {

class SuffixIndex;

// One earlier place where the last `length` tokens were seen; `at` is the token after them.
struct Occurrence {
  const SuffixIndex* text;
  uint32_t at;
  uint32_t length;
};

struct SuffixProposal {
  std::vector<int32_t> tokens;
  std::vector<int32_t> parents;  // -1 for the root
  std::vector<double> logf;      // estimated log chance of the whole path
};

class SuffixIndex {
 public:
  static constexpr std::array<uint32_t, 9> kLevels = {1, 2, 3, 4, 6, 8, 12, 16, 24};
  static constexpr int32_t kBreak = -1;       // stands between texts; nothing matches across it
  static constexpr uint32_t kLongest = 64;    // tokens compared
  static constexpr uint32_t kWalk = 32;  // occurrences looked at on one level,
  static constexpr uint32_t kLinks = 256;  // among so many that share its place in the table,
  static constexpr uint32_t kOccurrences = 24;  // and kept of one text

  // `most`: tokens held at the same time, a power of two. `last`: the greatest position, after
  // which positions are counted anew.
  explicit SuffixIndex(int64_t most, int64_t last = 0xfffffff0);

  void extend(const int32_t* tokens, std::size_t count);
  void end_text();
  uint32_t size() const { return end_ - begin(); }
  int64_t bytes() const;
  std::vector<int32_t> tokens() const;
  void copy_recent(std::vector<int32_t>& out, uint32_t most) const;
  // Occurrences of the end of `recent`, longest matches first.
  void find(const std::vector<int32_t>& recent, std::vector<Occurrence>& out) const;
  int32_t at(uint32_t position) const { return tokens_[position & mask_]; }
  bool has(uint32_t position) const { return position < end_ && position >= begin(); }

 private:
  uint32_t begin() const { return end_ > mask_ ? end_ - mask_ - 1 : 0; }
  void append(int32_t token);
  void rebuild(uint32_t capacity);
  uint32_t slot(std::size_t level, uint64_t hash) const;
  uint32_t match(const std::vector<int32_t>& recent, uint32_t before) const;

  uint32_t most_, last_;
  uint32_t mask_ = 0, end_ = 0, run_ = 0;
  int shift_ = 0;
  std::vector<int32_t> tokens_;
  std::vector<uint32_t> heads_, links_;           // a level after the other; position + 1, or 0
  std::array<uint64_t, kLongest> prefix_hashes_;  // of the text so far, by tokens since its start
};

// The likeliest continuations of `own` by what followed its last tokens in itself and in
// `history` (or null): at most `limit` nodes, best first.
SuffixProposal propose_suffix(const SuffixIndex& own, const SuffixIndex* history, std::size_t limit);

}  // namespace coppice
