#include "suffix.h"

#include <algorithm>
#include <cmath>
#include <queue>
#include <utility>

namespace coppice {
namespace {

constexpr uint64_t kBase = 0x9e3779b97f4a7c15ull, kMix = 0xd6e8feb86659fd93ull;
constexpr uint32_t kFirst = 256;  // tokens a new index has room for
constexpr double kLeast = 0.01;   // least path chance of a node

uint64_t power(uint32_t exponent) {
  static const auto table = [] {
    std::array<uint64_t, SuffixIndex::kLongest + 1> powers{1};
    for (size_t i = 1; i < powers.size(); ++i) powers[i] = powers[i - 1] * kBase;
    return powers;
  }();
  return table[exponent];
}

// How much one occurrence counts, and how far the longest match is to be trusted.
double weight(uint32_t length) {
  const double n = length;
  return n * n;
}

double trust(uint32_t length) { return 1.0 - 0.9 / (length + 0.5); }

}  // namespace

SuffixIndex::SuffixIndex(int64_t most, int64_t last)
    : most_(static_cast<uint32_t>(most)), last_(static_cast<uint32_t>(last)) {
  prefix_hashes_.fill(0);
  rebuild(std::min(kFirst, most_));
}

void SuffixIndex::extend(const int32_t* tokens, size_t count) {
  for (size_t i = 0; i < count; ++i) append(tokens[i]);
}

void SuffixIndex::end_text() {
  if (run_) append(kBreak);
}

int64_t SuffixIndex::bytes() const {
  return static_cast<int64_t>(sizeof(*this) + tokens_.capacity() * sizeof(tokens_[0]) +
                              (heads_.capacity() + links_.capacity()) * sizeof(heads_[0]));
}

std::vector<int32_t> SuffixIndex::tokens() const {
  std::vector<int32_t> all;
  copy_recent(all, size());
  return all;
}

void SuffixIndex::copy_recent(std::vector<int32_t>& out, uint32_t most) const {
  const uint32_t count = std::min(most, size());
  out.resize(count);
  for (uint32_t i = 0; i < count; ++i) out[i] = at(end_ - count + i);
}

void SuffixIndex::append(int32_t token) {
  if (end_ == last_) rebuild(mask_ + 1);
  if (size() > mask_ && mask_ + 1 < most_) rebuild(2 * (mask_ + 1));
  const uint64_t now = prefix_hashes_[run_ % kLongest];
  for (size_t level = 0; level < kLevels.size() && kLevels[level] <= run_; ++level) {
    const uint32_t n = kLevels[level];
    const uint64_t hash = now - prefix_hashes_[(run_ - n) % kLongest] * power(n);
    uint32_t& head = heads_[slot(level, hash)];
    links_[level * (mask_ + 1ull) + (end_ & mask_)] = head;
    head = end_ + 1;
  }
  tokens_[end_ & mask_] = token;
  ++end_;
  if (token == kBreak) {
    run_ = 0;
    prefix_hashes_[0] = 0;
  } else {
    ++run_;
    prefix_hashes_[run_ % kLongest] = now * kBase + static_cast<uint64_t>(token) + 1;
  }
}

void SuffixIndex::rebuild(uint32_t capacity) {
  std::vector<int32_t> kept;
  if (!tokens_.empty()) copy_recent(kept, std::min(size(), capacity));
  mask_ = capacity - 1;
  shift_ = 64;
  for (uint32_t n = capacity; n > 1; n /= 2) --shift_;
  end_ = run_ = 0;
  prefix_hashes_[0] = 0;
  tokens_ = std::vector<int32_t>(capacity);
  heads_ = std::vector<uint32_t>(kLevels.size() * capacity);
  links_ = std::vector<uint32_t>(kLevels.size() * capacity);
  extend(kept.data(), kept.size());
}

uint32_t SuffixIndex::slot(size_t level, uint64_t hash) const {
  if (mask_ == 0) return static_cast<uint32_t>(level);
  const uint64_t mixed = (hash ^ hash >> 31) * kMix;
  return static_cast<uint32_t>(level * (mask_ + 1ull) + (mixed >> shift_));
}

// How many of the last tokens of `recent` stand before a position.
uint32_t SuffixIndex::match(const std::vector<int32_t>& recent, uint32_t before) const {
  const uint32_t limit = std::min(static_cast<uint32_t>(recent.size()), before - begin());
  uint32_t n = 0;
  while (n < limit && at(before - 1 - n) == recent[recent.size() - 1 - n]) ++n;
  return n;
}

void SuffixIndex::find(const std::vector<int32_t>& recent, std::vector<Occurrence>& out) const {
  std::array<uint64_t, kLevels.size()> hashes{};
  size_t levels = 0;
  uint64_t hash = 0;
  for (uint32_t n = 1; levels < kLevels.size() && n <= recent.size(); ++n) {
    const int32_t token = recent[recent.size() - n];
    if (token == kBreak) break;
    hash += (static_cast<uint64_t>(token) + 1) * power(n - 1);
    if (n == kLevels[levels]) hashes[levels++] = hash;
  }
  uint32_t kept = 0, seen = kLongest + 1;  // matches this long were found on a longer level
  for (size_t level = levels; level-- > 0 && kept < kOccurrences;) {
    uint32_t link = heads_[slot(level, hashes[level])];
    uint32_t walked = 0;
    for (uint32_t i = 0; i < kLinks && walked < kWalk && link && kept < kOccurrences; ++i) {
      const uint32_t position = link - 1;
      if (!has(position)) break;
      const uint32_t length = match(recent, position);
      if (length >= kLevels[level]) {
        ++walked;
        if (length < seen) {
          out.push_back({this, position, length});
          ++kept;
        }
      }
      link = links_[level * (mask_ + 1ull) + (position & mask_)];
    }
    seen = kLevels[level];
  }
}

namespace {

// A continuation not yet taken into the tree: its last token, and who stands behind it.
struct Branch {
  double chance;
  int32_t parent, token;
  uint32_t depth;
  std::vector<Occurrence> behind;
};

struct Later {
  const std::vector<Branch>& branches;
  bool operator()(uint32_t a, uint32_t b) const {
    const double x = branches[a].chance, y = branches[b].chance;
    return x != y ? x < y : a > b;
  }
};

// The tokens that follow a node, each with its share of the node's occurrences.
void branch(const std::vector<Occurrence>& here, uint32_t depth, int32_t parent, double chance,
            std::vector<Branch>& out) {
  const size_t first = out.size();
  std::vector<double> masses;
  double total = 0.0;
  uint32_t longest = 0;
  for (const Occurrence& each : here) {
    const uint32_t next = each.at + depth;
    if (!each.text->has(next)) continue;
    const int32_t token = each.text->at(next);
    if (token == SuffixIndex::kBreak) continue;
    size_t i = first;
    while (i < out.size() && out[i].token != token) ++i;
    if (i == out.size()) {
      out.push_back({0.0, parent, token, depth + 1, {}});
      masses.push_back(0.0);
    }
    out[i].behind.push_back(each);
    masses[i - first] += weight(each.length);
    total += weight(each.length);
    longest = std::max(longest, each.length);
  }
  const double trusted = trust(longest + depth);
  for (size_t i = first; i < out.size(); ++i) {
    out[i].chance = chance * (masses[i - first] / total) * trusted;
  }
}

}  // namespace

SuffixProposal propose_suffix(const SuffixIndex& own, const SuffixIndex* history, size_t limit) {
  SuffixProposal tree;
  std::vector<int32_t> recent;
  own.copy_recent(recent, SuffixIndex::kLongest);
  std::vector<Occurrence> found;
  own.find(recent, found);
  if (history) history->find(recent, found);
  std::vector<Branch> branches;
  branches.reserve(4 * limit + 64);
  branch(found, 0, -1, 1.0, branches);
  std::priority_queue<uint32_t, std::vector<uint32_t>, Later> best(Later{branches});
  for (uint32_t i = 0; i < branches.size(); ++i) best.push(i);
  while (!best.empty() && tree.tokens.size() < limit) {
    const uint32_t taken = best.top();
    best.pop();
    const double chance = branches[taken].chance;
    if (chance < kLeast) break;
    const auto node = static_cast<int32_t>(tree.tokens.size());
    tree.tokens.push_back(branches[taken].token);
    tree.parents.push_back(branches[taken].parent);
    tree.logf.push_back(std::log(chance));
    const auto first = static_cast<uint32_t>(branches.size());
    const std::vector<Occurrence> behind = std::move(branches[taken].behind);
    branch(behind, branches[taken].depth, node, chance, branches);
    for (uint32_t i = first; i < branches.size(); ++i) best.push(i);
  }
  return tree;
}

}  // namespace coppice
