#pragma once

#include <nearfar/tokens.hpp>

#include <cstdint>
#include <initializer_list>
#include <random>
#include <utility>
#include <vector>

namespace train {

using nearfar::Index;

/// Random numbers that are the same everywhere: std::mt19937_64 and std::seed_seq, which the standard fixes to the bit,
/// and mappings of our own, because it leaves those of its distributions open.
///
/// Nothing keeps a generator from step to step. Whoever draws makes one from a key such as {seed, purpose, step}: so a
/// run that stopped draws the same numbers when it goes on, with nothing to restore.
class Random {
 public:
  explicit Random(std::initializer_list<std::uint64_t> key) {
    std::vector<std::uint32_t> words;
    for (const std::uint64_t part : key) {
      words.push_back(static_cast<std::uint32_t>(part));
      words.push_back(static_cast<std::uint32_t>(part >> 32));
    }
    std::seed_seq sequence(words.begin(), words.end());
    engine_.seed(sequence);
  }

  std::uint64_t bits() { return engine_(); }

  /// In [0, 1).
  double uniform() { return static_cast<double>(engine_() >> 11) * 0x1p-53; }

  /// In [0, count), every number as likely as the next.
  Index below(Index count) {
    const auto n = static_cast<std::uint64_t>(count);
    const std::uint64_t limit = UINT64_MAX - UINT64_MAX % n;
    std::uint64_t drawn;
    do drawn = engine_();
    while (drawn >= limit);
    return static_cast<Index>(drawn % n);
  }

  template <class T>
  void shuffle(std::vector<T>& items) {
    for (std::size_t i = items.size(); i > 1; --i) {
      std::swap(items[i - 1], items[static_cast<std::size_t>(below(static_cast<Index>(i)))]);
    }
  }

 private:
  std::mt19937_64 engine_;
};

/// What a key's second part says the numbers are for.
enum class Purpose : std::uint64_t { weights, training_data, evaluation_data, dropout };

inline Random random_for(std::uint64_t seed, Purpose purpose, Index number = 0) {
  return Random({seed, static_cast<std::uint64_t>(purpose), static_cast<std::uint64_t>(number)});
}

}  // namespace train
