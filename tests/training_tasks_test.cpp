// What the training tasks ask of a model.

#include "../examples/train/bytes.hpp"
#include "../examples/train/copy.hpp"
#include "../examples/train/fashion.hpp"
#include "../examples/train/listops.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

namespace fs = std::filesystem;
using namespace train;

TEST(TrainingRandom, IsTheSameEverywhere) {
  Random random({1, 2, 3});
  std::vector<std::uint64_t> drawn;
  for (int i = 0; i < 3; ++i) drawn.push_back(random.bits());
  EXPECT_EQ(drawn, (std::vector<std::uint64_t>{16362493885974328174U, 5057471783057986117U, 17426417406422950709U}));
}

TEST(TrainingRandom, IsAnotherForEveryKey) {
  std::set<std::uint64_t> first;
  for (std::uint64_t seed = 0; seed < 10; ++seed) {
    for (const Purpose purpose : {Purpose::weights, Purpose::training_data, Purpose::dropout}) {
      for (Index step = 0; step < 10; ++step) first.insert(random_for(seed, purpose, step).bits());
    }
  }
  EXPECT_EQ(first.size(), 300U);
}

TEST(TrainingRandom, IsUniform) {
  Random random({1});
  std::vector<int> counts(7);
  double sum = 0;
  for (int i = 0; i < 7000; ++i) {
    ++counts[static_cast<std::size_t>(random.below(7))];
    sum += random.uniform();
  }
  for (const int count : counts) EXPECT_NEAR(count, 1000, 150);
  EXPECT_NEAR(sum / 7000, 0.5, 0.02);
}

TEST(TrainingEpochs, GiveEveryExampleOnceAnEpochInANewOrderEachTime) {
  const Epochs epochs(10, 4, 1);
  std::vector<Index> order;
  for (Index step = 0; step < 5; ++step) {
    for (const Index example : epochs.examples(step)) order.push_back(example);
  }
  const std::vector<Index> first(order.begin(), order.begin() + 10), second(order.begin() + 10, order.end());
  EXPECT_EQ(std::set<Index>(first.begin(), first.end()).size(), 10U);
  EXPECT_EQ(std::set<Index>(second.begin(), second.end()).size(), 10U);
  EXPECT_NE(first, second);
  EXPECT_EQ(epochs.examples(1), std::vector<Index>(order.begin() + 4, order.begin() + 8))
      << "whatever was asked before";
}

TEST(TrainingCopy, AsksForTheSymbolsBeforeTheSeparatorOnceMore) {
  const CopyTask task({.batch = 50, .length = 21});
  const Batch batch = task.training_batch(3);
  ASSERT_EQ(batch.sequences(), 50);
  std::set<Index> lengths;
  for (std::size_t b = 0; b < 50; ++b) {
    const Index begin = batch.offsets[b], count = (batch.offsets[b + 1] - begin) / 2;
    const auto at = [begin](const std::vector<int>& of, Index i) { return of[static_cast<std::size_t>(begin + i)]; };
    lengths.insert(count);
    for (Index i = 0; i < count; ++i) {
      EXPECT_GE(at(batch.tokens, i), 1);
      EXPECT_LE(at(batch.tokens, i), 10);
      EXPECT_EQ(at(batch.targets, i), no_target);
      EXPECT_EQ(at(batch.targets, count + i), at(batch.tokens, i));
    }
    EXPECT_EQ(at(batch.tokens, count), 0);
  }
  EXPECT_EQ(lengths, (std::set<Index>{5, 6, 7, 8, 9}));
  EXPECT_NE(task.training_batch(4).tokens, batch.tokens);
  EXPECT_NE(task.evaluation_batch(Part::test, 0).tokens, task.evaluation_batch(Part::validation, 0).tokens);
}

/// The value of a list, read from its tokens alone.
int value_of(const std::string& tokens, std::size_t& at) {
  const char token = tokens.at(at++);
  if (token < 10) return token;
  std::vector<int> arguments;
  while (tokens.at(at) != ListOps::close) arguments.push_back(value_of(tokens, at));
  ++at;
  return ListOps::apply(token, arguments);
}

TEST(TrainingListOps, OperatorsAreThoseOfTheBenchmark) {
  EXPECT_EQ(ListOps::apply(ListOps::min, {4, 2, 9}), 2);
  EXPECT_EQ(ListOps::apply(ListOps::max, {4, 2, 9}), 9);
  EXPECT_EQ(ListOps::apply(ListOps::median, {9, 2, 4}), 4);
  EXPECT_EQ(ListOps::apply(ListOps::median, {9, 2, 4, 5}), 4) << "4.5, rounded down";
  EXPECT_EQ(ListOps::apply(ListOps::sum_modulo, {9, 2, 4}), 5);
}

TEST(TrainingListOps, TreesAreWholeAndHaveTheValueOfTheirTokens) {
  Random random({5});
  int operators = 0;
  std::size_t most = 0;
  for (int i = 0; i < 4000; ++i) {
    const auto [tokens, value] = ListOps::random_tree(random);
    if (tokens.empty()) continue;
    std::size_t end = 0;
    EXPECT_EQ(value_of(tokens, end), value);
    EXPECT_EQ(end, tokens.size());
    operators += tokens.front() >= ListOps::min;
    most = std::max(most, tokens.size());
  }
  EXPECT_NEAR(operators, 1000, 120) << "a quarter of the roots";
  EXPECT_GT(most, 500U);
  EXPECT_LE(most, 1999U);
}

TEST(TrainingFashion, HasRowsOfPixelsAndTheirClassOrNamesThePackage) {
  try {
    const FashionTask task({.batch = 7, .length = 784});
    const Batch batch = task.training_batch(0), last = task.evaluation_batch(Part::test, 10000 / 7);
    EXPECT_EQ(batch.offsets, (std::vector<Index>{0, 784, 1568, 2352, 3136, 3920, 4704, 5488}));
    EXPECT_EQ(last.sequences(), 10000 % 7);
    EXPECT_EQ(last.targets.back(), 5) << "a sandal";
    EXPECT_EQ(task.evaluation_batch(Part::test, 0).targets.front(), 9) << "an ankle boot";
    const auto [darkest, brightest] = std::minmax_element(batch.tokens.begin(), batch.tokens.end());
    EXPECT_EQ(*darkest, 0);
    EXPECT_EQ(*brightest, 255);
  } catch (const std::runtime_error& error) {
    EXPECT_NE(std::string(error.what()).find("install Debian's package dataset-fashion-mnist"), std::string::npos);
  }
  EXPECT_THROW(FashionTask({.length = 100}), std::exception);
}

class TrainingFiles : public testing::Test {
 protected:
  const fs::path folder = fs::temp_directory_path() / "nearfar-training-files";
  void SetUp() override { fs::create_directories(folder); }
  void TearDown() override { fs::remove_all(folder); }
};

TEST_F(TrainingFiles, ListOpsRefusesDataThatIsNotItsOwn) {
  write_sealed(folder / "listops", "nearfar ListOps 1", "\1short");
  EXPECT_THROW(ListOps{folder}, std::runtime_error);
  write_file(folder / "listops", "other");
  EXPECT_THROW(ListOps{folder}, std::runtime_error);
}

TEST_F(TrainingFiles, BytesAsksForTheNextByteAndHoldsTheEndBack) {
  std::string text;
  for (int i = 0; i < 1000; ++i) text.push_back(static_cast<char>(i % 251));
  write_file(folder / "a", text.substr(0, 300));
  write_file(folder / "b", text.substr(300));
  const BytesTask task({.batch = 8, .length = 20}, {folder / "a", folder / "b"});
  for (Index step = 0; step < 20; ++step) {
    const Batch batch = task.training_batch(step);
    ASSERT_EQ(batch.sequences(), 8);
    for (std::size_t i = 0; i < batch.tokens.size(); ++i) EXPECT_EQ(batch.targets[i], (batch.tokens[i] + 1) % 251);
  }
  EXPECT_EQ(task.evaluation_batches(Part::test), 2);
  EXPECT_EQ(task.evaluation_batch(Part::validation, 0).tokens.front(), 900 % 251);
  EXPECT_EQ(task.evaluation_batch(Part::test, 0).tokens.front(), 950 % 251);
  EXPECT_EQ(task.evaluation_batch(Part::test, 1).tokens.front(), 970 % 251);
  EXPECT_NEAR(task.score({.cross_entropy = 20 * std::log(2.0), .correct = 0, .targets = 10}), 2, 1e-12);
}

TEST_F(TrainingFiles, AFolderThatCannotBeMadeIsNamed) {
  make_folder(folder / "some" / "depth");
  make_folder(folder / "some" / "depth");
  EXPECT_TRUE(fs::is_directory(folder / "some" / "depth"));
  write_file(folder / "a", "no folder");
  try {
    make_folder(folder / "a" / "depth");
    FAIL() << "there is a file in its way";
  } catch (const std::runtime_error& error) {
    EXPECT_TRUE(
        std::string(error.what()).starts_with("cannot make the folder " + (folder / "a/depth").string() + ": "));
  }
}

TEST_F(TrainingFiles, BytesRefusesFilesThatAreMissingOrTooShort) {
  write_file(folder / "a", "short");
  EXPECT_THROW(BytesTask({.length = 20}, {folder / "a"}), std::runtime_error);
  EXPECT_THROW(BytesTask({.length = 20}, {folder / "none"}), std::runtime_error);
}

}  // namespace
