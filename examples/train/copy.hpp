#pragma once

#include "task.hpp"

#include <stdexcept>

namespace train {

/// Copying: a random string s of ten symbols, a separator, and s again, of which the second half is to be predicted
/// token by token. Far tokens matter one by one, which is hard for a far field of low rank.
///
/// The synthetic task of FMMformer (arXiv 2108.02347, section 5) and of Katharopoulos et al. (arXiv 2006.16236): the
/// length of s is drawn from [length / 4, (length - 1) / 2). As there, tokens and positions start side by side: with
/// small random numbers that are added, a model of a few layers hardly learns within thousands of steps where to look.
class CopyTask : public Task {
 public:
  static Setting setting() { return {.steps = 2000, .batch = 32, .length = 128, .dropout = 0}; }

  explicit CopyTask(const Setting& setting) : length_(setting.length), batch_(setting.batch), seed_(setting.seed) {
    if (length_ < 8)
      throw std::invalid_argument("copy needs a length of 8 or more, but it is " + std::to_string(length_) + ".");
  }

  ModelOptions model() const override {
    return {
        .vocabulary = symbols + 1, .max_length = length_, .embedding = EmbeddingStart::apart, .classes = symbols + 1};
  }
  bool causal() const override { return true; }

  Batch training_batch(Index step) const override { return draw(random_for(seed_, Purpose::training_data, step)); }

  Index evaluation_batches(Part) const override { return 8; }
  Batch evaluation_batch(Part part, Index number) const override {
    return draw(random_for(part == Part::test, Purpose::evaluation_data, number));
  }

 private:
  static constexpr int separator = 0, symbols = 10;

  Batch draw(Random random) const {
    Batch batch;
    std::vector<int> text;
    for (Index b = 0; b < batch_; ++b) {
      text.clear();
      const Index shortest = length_ / 4, count = shortest + random.below((length_ - 1) / 2 - shortest);
      for (Index i = 0; i < count; ++i) text.push_back(1 + static_cast<int>(random.below(symbols)));
      text.push_back(separator);
      text.insert(text.end(), text.begin(), text.begin() + count);

      // From the separator on, each token's target is the one after it.
      batch.tokens.insert(batch.tokens.end(), text.begin(), text.end() - 1);
      batch.targets.insert(batch.targets.end(), static_cast<std::size_t>(count), no_target);
      batch.targets.insert(batch.targets.end(), text.begin() + count + 1, text.end());
      batch.end_sequence();
    }
    return batch;
  }

  Index length_, batch_;
  std::uint64_t seed_;
};

}  // namespace train
