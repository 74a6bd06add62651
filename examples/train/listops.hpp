#pragma once

#include "files.hpp"
#include "task.hpp"

#include <algorithm>
#include <array>
#include <cstdio>
#include <filesystem>
#include <numeric>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

namespace train {

/// Nested lists of digits under the operators MIN, MAX, MED (the median, rounded down) and SM (the sum modulo 10), such
/// as [MAX 2 9 [MIN 4 7 ] 0 ], whose value, a digit, is the class of the sequence.
///
/// Long Range Arena (arXiv 2011.04006), by the rules of its generator: a node is a digit, unless a uniform number is at
/// most 0.25 and its depth, 1 at the root, less than 10: then it is an operator of 2 to 10 arguments. Trees of more
/// than 500 and less than 2000 tokens are kept, none twice: 96,000 to train, 2,000 to validate, 2,000 to test.
class ListOps {
 public:
  static constexpr Index training = 96000, validation = 2000, test = 2000;
  static constexpr Index shortest = 501, longest = 1999;

  /// Tokens: the digits, the four operators with their opening bracket, and the closing one.
  enum Token : char { min = 10, max, median, sum_modulo, close };
  static constexpr Index vocabulary = 15;

  struct Example {
    std::string_view tokens;
    int value;
  };

  /// Reads the data from `folder`, or generates it and writes it there, in some seconds and 100 MB.
  explicit ListOps(const std::filesystem::path& folder) {
    const std::filesystem::path path = folder / "listops";
    if (!std::filesystem::exists(path)) {
      std::printf("Generating ListOps, once, into %s\n", path.c_str());
      make_folder(folder);
      write_sealed(path, first_line, generate());
    }
    content_ = read_sealed(path, first_line);
    if (checksum(content_) != known_checksum) {
      throw std::runtime_error(path.string() + " does not hold the sequences that the generator makes: remove it.");
    }
    ByteReader reader(content_);
    while (!reader.at_end()) {
      const int value = reader.number<char>();
      examples_.push_back({reader.text(), value});
    }
  }

  const Example& operator[](Index i) const { return examples_[static_cast<std::size_t>(i)]; }

  /// A random tree's tokens and value; no tokens if it has more than `longest`.
  static std::pair<std::string, int> random_tree(Random& random) {
    std::string tokens;
    const int value = append_node(random, 1, tokens);
    if (static_cast<Index>(tokens.size()) > longest) tokens.clear();
    return {tokens, value};
  }

  static int apply(char operation, std::vector<int> arguments) {
    std::sort(arguments.begin(), arguments.end());
    const std::size_t count = arguments.size();
    switch (operation) {
      case min:
        return arguments.front();
      case max:
        return arguments.back();
      case median:
        return (arguments[(count - 1) / 2] + arguments[count / 2]) / 2;
      default:
        return std::accumulate(arguments.begin(), arguments.end(), 0) % 10;
    }
  }

 private:
  static constexpr std::string_view first_line = "nearfar ListOps 1";
  static constexpr std::uint64_t known_checksum = 0xee248d83f532e577U;

  static int append_node(Random& random, int depth, std::string& tokens) {
    if (static_cast<Index>(tokens.size()) > longest) return 0;
    if (depth == 10 || random.uniform() > 0.25) {
      const int digit = static_cast<int>(random.below(10));
      tokens.push_back(static_cast<char>(digit));
      return digit;
    }
    const char operation = static_cast<char>(min + random.below(4));
    std::vector<int> arguments(static_cast<std::size_t>(2 + random.below(9)));
    tokens.push_back(operation);
    for (int& argument : arguments) argument = append_node(random, depth + 1, tokens);
    tokens.push_back(close);
    return apply(operation, arguments);
  }

  static std::string generate() {
    Random random({2011, 4006});
    std::unordered_set<std::string> seen;
    ByteWriter content;
    while (static_cast<Index>(seen.size()) < training + validation + test) {
      auto [tokens, value] = random_tree(random);
      if (static_cast<Index>(tokens.size()) < shortest || seen.contains(tokens)) continue;
      content.number(static_cast<char>(value));
      content.text(tokens);
      seen.insert(std::move(tokens));
    }
    return content.bytes();
  }

  std::string content_;
  std::vector<Example> examples_;
};

/// ListOps with the model and training of FMMformer's repository.
class ListOpsTask : public Task {
 public:
  static Setting setting() {
    return {
        .steps = 5000, .batch = 32, .length = 2000, .evaluate_every = 500, .rate = 1e-4, .warm_up = 1000, .clip = 0};
  }

  ListOpsTask(const Setting& setting, const std::filesystem::path& folder)
      : data_(folder),
        length_(setting.length),
        batch_(setting.batch),
        epochs_(ListOps::training, batch_, setting.seed) {}

  ModelOptions model() const override {
    return {.vocabulary = ListOps::vocabulary, .max_length = length_, .classes = 10, .pool = true};
  }
  bool causal() const override { return false; }

  Batch training_batch(Index step) const override { return batch_of(epochs_.examples(step)); }

  Index evaluation_batches(Part part) const override { return (examples(part) + batch_ - 1) / batch_; }
  Batch evaluation_batch(Part part, Index number) const override {
    const Index first = number * batch_, count = std::min(batch_, examples(part) - first);
    std::vector<Index> chosen(static_cast<std::size_t>(count));
    std::iota(chosen.begin(), chosen.end(), first + ListOps::training + (part == Part::test ? ListOps::validation : 0));
    return batch_of(chosen);
  }

 private:
  static Index examples(Part part) { return part == Part::test ? ListOps::test : ListOps::validation; }

  Batch batch_of(const std::vector<Index>& chosen) const {
    Batch batch;
    for (const Index i : chosen) {
      const std::string_view tokens = data_[i].tokens.substr(0, static_cast<std::size_t>(length_));
      batch.tokens.insert(batch.tokens.end(), tokens.begin(), tokens.end());
      batch.targets.push_back(data_[i].value);
      batch.end_sequence();
    }
    return batch;
  }

  ListOps data_;
  Index length_, batch_;
  Epochs epochs_;
};

}  // namespace train
