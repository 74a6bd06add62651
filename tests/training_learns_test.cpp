// Small models learn with every mechanism what they cannot learn without attention.

#include "../examples/train/copy.hpp"
#include "../examples/train/trainer.hpp"

#include <nearfar/nearfar.hpp>

#include <gtest/gtest.h>

#include <cmath>
#include <memory>
#include <numeric>
#include <string>

namespace {

using namespace train;
using nearfar::Heads;
using nearfar::InputGradients;
using nearfar::Inputs;

const Setting setting{.steps = 150,
                      .batch = 32,
                      .length = 16,
                      .width = 32,
                      .feed_forward = 32,
                      .dropout = 0,
                      .rate = 5e-3,
                      .warm_up = 10};
constexpr Heads heads{.query = 2, .key_value = 2, .dim = 16};

/// Every token's target is the token at the mirrored place, for mechanisms that see both sides.
class MirrorTask : public Task {
 public:
  ModelOptions model() const override { return {.vocabulary = 10, .max_length = 6, .classes = 10}; }
  bool causal() const override { return false; }
  Batch training_batch(Index step) const override { return draw(random_for(1, Purpose::training_data, step)); }
  Index evaluation_batches(Part) const override { return 8; }
  Batch evaluation_batch(Part, Index number) const override {
    return draw(random_for(1, Purpose::evaluation_data, number));
  }

 private:
  static Batch draw(Random random) {
    Batch batch;
    for (Index b = 0; b < setting.batch; ++b) {
      std::vector<int> text(static_cast<std::size_t>(4 + 2 * random.below(2)));
      for (int& token : text) token = static_cast<int>(random.below(10));
      batch.tokens.insert(batch.tokens.end(), text.begin(), text.end());
      batch.targets.insert(batch.targets.end(), text.rbegin(), text.rend());
      batch.end_sequence();
    }
    return batch;
  }
};

/// Attention whose output is zero.
class Silence {
 public:
  using Scalar = double;
  using Parameters = nearfar::NoParameters;
  struct Saved {};

  const Heads& heads() const { return ::heads; }
  const Parameters& parameters() const { return none_; }
  Parameters& parameters() { return none_; }
  void forward(const Inputs<double>&, Tokens<double> out) const { out.matrix().setZero(); }
  void forward(const Inputs<double>&, Tokens<double> out, Saved&) const { out.matrix().setZero(); }
  void backward(const Inputs<double>&, Tokens<const double>, const Saved&, Tokens<const double>,
                const InputGradients<double>& grad, Parameters&) const {
    for (const Tokens<double>& of : {grad.query, grad.key, grad.value}) of.matrix().setZero();
  }

 private:
  Parameters none_;
};

std::unique_ptr<Task> task_for(bool causal) {
  if (causal) return std::make_unique<CopyTask>(setting);
  return std::make_unique<MirrorTask>();
}

/// The mean loss on data that the model never saw.
template <class Attention>
double loss_after_training(const Task& task, const Attention& attention) {
  Trainer<Attention> trainer(task, setting, attention, "test", 1);
  while (trainer.step() < setting.steps) trainer.train_step();
  const Loss loss = trainer.evaluate(Part::validation);
  return loss.cross_entropy / static_cast<double>(loss.targets);
}

// All symbols are equally likely: without other tokens nothing is better than the loss of a blind guess.
const double blind = std::log(10.0);

class TrainingLearns : public testing::TestWithParam<const char*> {
 protected:
  using Attention = nearfar::AnyAttention<double>;

  std::string line = GetParam();
  Attention attention{heads, line};
  std::unique_ptr<Task> task = task_for(line.find("causal") != std::string::npos);
};

TEST_P(TrainingLearns, ALossThatNeedsAttention) { EXPECT_LT(loss_after_training(*task, attention), blind - 0.4); }

TEST_P(TrainingLearns, WithAGradientThatSaysHowFastTheLossFalls) {
  Trainer<Attention> trainer(*task, setting, attention, "test", 1);
  for (int i = 0; i < 5; ++i) trainer.train_step();
  nearfar::Context context(1);
  const Batch batch = task->training_batch(0);
  Matrix<double> grad(static_cast<Index>(batch.tokens.size()), task->model().classes);
  const auto loss = [&] {
    const Tokens<const double> logits = trainer.model().forward(batch, nullptr, context);
    return cross_entropy<double>(logits, batch.targets, 1.0, grad).cross_entropy;
  };
  loss();
  trainer.model().backward(Tokens<const double>(grad), context);

  // Adam would hide a gradient of the wrong scale, and the whole model's gradient a wrong one of few parameters.
  for (const Variable<double>& variable : variables_of(trainer.model())) {
    const double norm = std::sqrt(
        std::inner_product(variable.gradient.begin(), variable.gradient.end(), variable.gradient.begin(), 0.0));
    if (norm < 1e-6) continue;  // the biases of keys have none
    const auto walk = [&](double distance) {
      for (std::size_t i = 0; i < variable.value.size(); ++i) {
        variable.value[i] += distance / norm * variable.gradient[i];
      }
    };
    constexpr double distance = 3e-7;
    walk(distance);
    const double above = loss();
    walk(-2 * distance);
    const double below = loss();
    walk(distance);
    EXPECT_NEAR((above - below) / (2 * distance) / norm, 1, 1e-3) << variable.name;
  }
}

INSTANTIATE_TEST_SUITE_P(Mechanisms, TrainingLearns,
                         testing::Values("softmax:causal", "banded:left=9,causal", "linear:maps=elu+elu_flip,causal",
                                         "nystrom:landmarks=2", "fmm:left=3,maps=elu+tanh,causal", "additive:causal",
                                         "multipole:block=4,rank=2,causal",
                                         "multipole:block=4,rank=2,pooling=hierarchical_convolution,pooled_queries"));

TEST(TrainingWithoutAttention, LearnsNothingOfOtherTokens) {
  for (const bool causal : {true, false}) EXPECT_GT(loss_after_training(*task_for(causal), Silence()), blind - 0.02);
}

}  // namespace
