// A run that stopped goes on as if it had not, and never from a file that is not its own.

#include "../examples/train/copy.hpp"
#include "../examples/train/trainer.hpp"

#include <nearfar/fmm.hpp>

#include <gtest/gtest.h>

#include <csignal>
#include <filesystem>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

namespace fs = std::filesystem;
using namespace train;
using Attention = nearfar::Fmm<float>;  // it has parameters of its own

class TrainingCheckpoint : public testing::Test {
 protected:
  const Setting setting{.steps = 12,
                        .batch = 4,
                        .length = 16,
                        .piece = 16,
                        .evaluate_every = 4,
                        .width = 16,
                        .feed_forward = 16,
                        .dropout = 0.2};
  const CopyTask task{setting};
  const Attention attention{{.query = 2, .key_value = 2, .dim = 8}, {.causal = true}};
  const std::string name = testing::UnitTest::GetInstance()->current_test_info()->name();
  const fs::path folder = fs::temp_directory_path() / ("nearfar-" + name);
  const fs::path file = folder / "checkpoint";

  void SetUp() override {
    fs::remove_all(folder);
    fs::create_directories(folder);
  }
  void TearDown() override { fs::remove_all(folder); }

  std::unique_ptr<Trainer<Attention>> make(const std::string& run = "copy") const {
    return std::make_unique<Trainer<Attention>>(task, setting, attention, run, 1);
  }

  static std::vector<float> numbers(Trainer<Attention>& trainer) {
    std::vector<float> all;
    for (const Variable<float>& variable : variables_of(trainer.model())) {
      all.insert(all.end(), variable.value.begin(), variable.value.end());
    }
    return all;
  }

  /// What loading `bytes` as a checkpoint is refused with; empty if it is not.
  std::string refusal(const std::string& bytes, const std::string& run = "copy") const {
    write_file(file, bytes);
    const auto trainer = make(run);
    const std::vector<float> before = numbers(*trainer);
    try {
      trainer->load(file);
    } catch (const std::runtime_error& error) {
      EXPECT_EQ(numbers(*trainer), before) << "a file that is refused changes nothing";
      return error.what();
    }
    return "";
  }

  std::string saved(const std::string& run = "copy") const {
    const auto trainer = make(run);
    for (int i = 0; i < 3; ++i) trainer->train_step();
    trainer->save(file);
    return read_file(file);
  }
};

TEST_F(TrainingCheckpoint, GoesOnWithTheSameBitsAsARunThatNeverStopped) {
  const auto whole = make();
  for (int i = 0; i < 12; ++i) whole->train_step();

  const auto first = make();
  for (int i = 0; i < 5; ++i) first->train_step();
  first->save(file);
  const auto second = make();
  second->load(file);
  EXPECT_EQ(second->step(), 5);
  for (int i = 0; i < 7; ++i) second->train_step();
  EXPECT_EQ(numbers(*second), numbers(*whole));

  const auto forgetful = make();
  EXPECT_NE(numbers(*forgetful), numbers(*whole));
}

TEST_F(TrainingCheckpoint, KeepsTheLogOfARunThatWasAskedToStop) {
  ASSERT_TRUE(make()->run(folder));
  const std::string whole = read_file(folder / "log.csv");
  fs::remove(folder / "log.csv");
  fs::remove(file);

  stop_requested = 1;
  const auto stopped = make();
  EXPECT_FALSE(stopped->run(folder));
  EXPECT_EQ(stopped->step(), 1);
  stop_requested = 0;
  const auto second = make();
  second->load(file);
  ASSERT_TRUE(second->run(folder));

  // Time and memory differ; steps, parts, losses and scores do not.
  const auto without_time = [](const std::string& log) {
    std::string kept;
    std::istringstream lines(log);
    for (std::string line; std::getline(lines, line);) {
      std::size_t end = 0;
      for (int comma = 0; comma < 4; ++comma) end = line.find(',', end) + 1;
      kept += line.substr(0, end) + '\n';
    }
    return kept;
  };
  EXPECT_EQ(without_time(read_file(folder / "log.csv")), without_time(whole));
}

TEST_F(TrainingCheckpoint, ThatIsDamagedIsRefused) {
  const std::string bytes = saved();
  ASSERT_EQ(refusal(bytes), "");
  for (std::size_t at = bytes.find('\n') + 1; at < bytes.size(); at += bytes.size() / 40) {
    std::string damaged = bytes;
    damaged[at] ^= 0x10;
    EXPECT_NE(refusal(damaged).find("is damaged"), std::string::npos) << "byte " << at;
  }
}

TEST_F(TrainingCheckpoint, ThatIsTruncatedIsRefused) {
  const std::string bytes = saved();
  for (std::size_t length = 0; length < bytes.size(); length += bytes.size() / 20) {
    EXPECT_NE(refusal(bytes.substr(0, length)), "") << length << " bytes";
  }
  EXPECT_NE(refusal(bytes.substr(0, bytes.size() - 1)).find("is damaged"), std::string::npos);
}

TEST_F(TrainingCheckpoint, ThatIsAnotherFileOrOfAnotherRunIsRefused) {
  EXPECT_NE(refusal("step,part,loss\n1,training,2\n").find("is not a file of this kind"), std::string::npos);
  EXPECT_NE(refusal(saved(), "copy --seed 2").find("another run: it has no more, but this one has --seed 2."),
            std::string::npos);
  fs::remove(file);
  EXPECT_THROW(make()->load(file), std::runtime_error);
  EXPECT_THROW(make()->load(folder), std::runtime_error);
}

TEST_F(TrainingCheckpoint, OfAnotherRunIsRefusedWithTheOptionsThatDiffer) {
  const std::string bytes = saved("bytes a b --attention softmax:causal --steps 12 --seed 1 --rate 1e-04");
  EXPECT_EQ(refusal(bytes, "bytes a --attention softmax:causal --start w=1 --steps 12 --seed 2 --rate 1e-04"),
            file.string() +
                " is a checkpoint of another run: it has bytes a b --seed 1, but this one has bytes a --start w=1 "
                "--seed 2.");
}

TEST_F(TrainingCheckpoint, OfTheSameRunThatEvaluatedMoreOftenIsItsOwn) {
  EXPECT_EQ(refusal(saved("copy --evaluate-every 4 --seed 1"), "copy --evaluate-every 400 --seed 1"), "");
}

TEST_F(TrainingCheckpoint, OfAModelOfAnotherSizeIsRefused) {
  saved();
  Setting wider = setting;
  wider.feed_forward = 24;
  Trainer<Attention> other(task, wider, attention, "copy", 1);
  EXPECT_THROW(other.load(file), std::runtime_error);
}

TEST_F(TrainingCheckpoint, LeavesTheOldFileWhereTheNewOneCannotBeWritten) {
  const std::string bytes = saved();
  fs::create_directories(folder / "checkpoint.unfinished");
  EXPECT_THROW(make()->save(file), std::runtime_error);
  EXPECT_EQ(read_file(file), bytes);
}

TEST_F(TrainingCheckpoint, IsOfTheSameRunWithAnyNumberOfThreads) {
  const auto one = make();
  Trainer<Attention> three(task, setting, attention, "copy", 3);
  for (int i = 0; i < 3; ++i) {
    one->train_step();
    three.train_step();
  }
  EXPECT_EQ(numbers(*one), numbers(three));
}

TEST_F(TrainingCheckpoint, ABatchInPiecesTrainsAsTheWholeBatch) {
  Setting at_once = setting;
  at_once.piece = 4096;
  at_once.dropout = 0;
  Setting in_pieces = at_once;
  in_pieces.piece = 16;
  Trainer<Attention> whole(task, at_once, attention, "copy", 1), pieces(task, in_pieces, attention, "copy", 1);
  for (int i = 0; i < 3; ++i) {
    const Loss loss_whole = whole.train_step(), loss_pieces = pieces.train_step();
    EXPECT_EQ(loss_whole.targets, loss_pieces.targets);
    EXPECT_NEAR(loss_whole.cross_entropy, loss_pieces.cross_entropy, 1e-3);
  }
}

class TrainingLog : public TrainingCheckpoint {
 protected:
  const fs::path log = folder / "log.csv";
  const std::string head = "step,part,loss,score,seconds,cpu_seconds,tokens,peak_mib\n";
  const std::string first = "50,training,2.5,10,1,1,1000,9.5\n", second = "100,training,2.25,11,2,2,2000,9.5\n";
};

TEST_F(TrainingLog, GoesOnBeforeTheFirstRowThatIsNone) {
  for (const char* damage : {"\n", "100\n", "100,training,2.2\n", ",,,,,,,\n", "x,training,2,1,1,1,1,1\n",
                             "60x,training,2,1,1,1,1,1\n", "99999999999999999999,training,2,1,1,1,1,1\n"}) {
    write_file(log, head + first + damage + second);
    const Log kept(log, 100, 200, task);
    EXPECT_EQ(read_file(log), head + first) << damage;
  }
  write_file(log, head + first + second);
  const Log kept(log, 100, 200, task);
  EXPECT_EQ(read_file(log), head + first + second);
}

TEST_F(TrainingLog, LeavesTheOldOneWhereTheNewOneCannotBeWritten) {
  write_file(log, head + first + second);
  fs::create_directories(folder / "log.csv.unfinished");
  EXPECT_THROW(Log(log, 50, 200, task), std::runtime_error);
  EXPECT_EQ(read_file(log), head + first + second);
}

TEST(TrainingSignals, TheFirstAsksTheRunToStopAndTheSecondEndsTheProgram) {
  for (const int number : {SIGINT, SIGTERM}) {
    const auto raise_twice = [number] {
      stop_at_signals();
      std::raise(number);
      std::cerr << "asked to stop: " << stop_requested;
      std::raise(number);
    };
    EXPECT_EXIT(raise_twice(), testing::KilledBySignal(number), "asked to stop: 1");
  }
}

}  // namespace
