#pragma once

#include "model.hpp"
#include "optimizer.hpp"
#include "random.hpp"

#include <cstdint>
#include <numeric>
#include <string>
#include <vector>

namespace train {

/// What a run may change by its command line; every task has its own defaults.
struct Setting {
  Index steps = 1000;
  Index batch = 32;    ///< sequences a step
  Index length = 0;    ///< of the longest sequence
  Index piece = 2048;  ///< tokens that go through the model at once; the gradients of a batch's pieces add up
  Index evaluate_every = 250;
  Index width = 64;
  Index layers = 2;
  Index heads = 2;
  Index feed_forward = 128;
  double dropout = 0.1;
  double rate = 1e-3;
  Index warm_up = 100;
  double clip = 1;
  std::uint64_t seed = 1;
};

enum class Part { validation, test };

/// What is learned. Batches are functions of a seed and a number, so a task has no state to keep in a checkpoint.
class Task {
 public:
  virtual ~Task() = default;

  /// Vocabulary, longest sequence, classes, and whether there is one answer a sequence or one a token.
  virtual ModelOptions model() const = 0;

  /// Whether a token must not see later ones, because they would give the answer away.
  virtual bool causal() const = 0;

  virtual Batch training_batch(Index step) const = 0;

  virtual Index evaluation_batches(Part part) const = 0;
  virtual Batch evaluation_batch(Part part, Index number) const = 0;

  virtual std::string score_name() const { return "accuracy"; }
  virtual double score(const Loss& loss) const {
    return 100 * static_cast<double>(loss.correct) / static_cast<double>(loss.targets);
  }
};

/// The examples of a data set in a new order each epoch.
class Epochs {
 public:
  Epochs(Index examples, Index batch, std::uint64_t seed) : batch_(batch), seed_(seed), order_(as_size(examples)) {}

  /// The examples of a step: `batch` of them, that may end one epoch and begin the next.
  std::vector<Index> examples(Index step) const {
    std::vector<Index> chosen;
    const auto count = static_cast<Index>(order_.size());
    for (Index i = step * batch_; i < (step + 1) * batch_; ++i) {
      if (i / count != epoch_) begin(i / count);
      chosen.push_back(order_[as_size(i % count)]);
    }
    return chosen;
  }

 private:
  static std::size_t as_size(Index i) { return static_cast<std::size_t>(i); }

  void begin(Index epoch) const {
    std::iota(order_.begin(), order_.end(), Index(0));
    Random random = random_for(seed_, Purpose::training_data, epoch);
    random.shuffle(order_);
    epoch_ = epoch;
  }

  Index batch_;
  std::uint64_t seed_;
  mutable std::vector<Index> order_;  // of the epoch that was asked for last
  mutable Index epoch_ = -1;
};

}  // namespace train
