#pragma once

#include "task.hpp"

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

namespace train {

/// Fashion-MNIST (Xiao et al., arXiv 1708.07747): pictures of clothes as sequences of 28 x 28 grey levels, ten classes.
/// Of the 60,000 pictures to train with, the last 5,000 are for validation.
class FashionTask : public Task {
 public:
  static Setting setting() { return {.steps = 1718, .batch = 32, .length = 784, .evaluate_every = 500}; }

  explicit FashionTask(const Setting& setting)
      : training_("train"), test_("t10k"), batch_(setting.batch), epochs_(training, batch_, setting.seed) {
    if (setting.length != pixels) {
      throw std::invalid_argument("a picture has 784 pixels, so --length cannot be " + std::to_string(setting.length) +
                                  ".");
    }
  }

  ModelOptions model() const override { return {.vocabulary = 256, .max_length = pixels, .classes = 10, .pool = true}; }
  bool causal() const override { return false; }

  Batch training_batch(Index step) const override { return batch_of(training_, epochs_.examples(step)); }

  Index evaluation_batches(Part part) const override { return (examples(part) + batch_ - 1) / batch_; }
  Batch evaluation_batch(Part part, Index number) const override {
    const Index first = number * batch_;
    std::vector<Index> chosen(static_cast<std::size_t>(std::min(batch_, examples(part) - first)));
    std::iota(chosen.begin(), chosen.end(), first + (part == Part::test ? 0 : training));
    return batch_of(part == Part::test ? test_ : training_, chosen);
  }

 private:
  static constexpr Index pixels = 28 * 28, training = 55000, validation = 5000, test = 10000;

  /// The pictures and classes of one half of Debian's package dataset-fashion-mnist.
  struct Pictures {
    std::vector<std::uint8_t> images, labels;

    explicit Pictures(const std::string& half)
        : images(read(half + "-images-idx3-ubyte", {half == "train" ? training + validation : test, 28, 28})),
          labels(read(half + "-labels-idx1-ubyte", {half == "train" ? training + validation : test})) {}
  };

  /// The bytes of a gzipped IDX file: two zeros, 8 for bytes, the number of sizes, each in four bytes from the highest
  /// on, and the bytes.
  static std::vector<std::uint8_t> read(const std::string& name, const std::vector<Index>& sizes) {
    const std::string path = "/usr/share/datasets/fashion-mnist/" + name + ".gz";
    if (!std::filesystem::exists(path)) {
      throw std::runtime_error("there is no " + path + ": install Debian's package dataset-fashion-mnist.");
    }
    std::vector<std::uint8_t> head = {0, 0, 8, static_cast<std::uint8_t>(sizes.size())};
    Index count = 1;
    for (const Index size : sizes) {
      count *= size;
      for (const int shift : {24, 16, 8, 0}) head.push_back(static_cast<std::uint8_t>(size >> shift));
    }
    const std::unique_ptr<FILE, int (*)(FILE*)> file(popen(("gzip -dc " + path).c_str(), "r"), pclose);
    std::vector<std::uint8_t> bytes(head.size() + static_cast<std::size_t>(count));
    const bool whole = file != nullptr && std::fread(bytes.data(), 1, bytes.size(), file.get()) == bytes.size();
    if (!whole || !std::equal(head.begin(), head.end(), bytes.begin())) {
      throw std::runtime_error(path + " does not hold what Fashion-MNIST does.");
    }
    bytes.erase(bytes.begin(), bytes.begin() + static_cast<std::ptrdiff_t>(head.size()));
    return bytes;
  }

  static Index examples(Part part) { return part == Part::test ? test : validation; }

  Batch batch_of(const Pictures& pictures, const std::vector<Index>& chosen) const {
    Batch batch;
    for (const Index i : chosen) {
      const auto first = pictures.images.begin() + i * pixels;
      batch.tokens.insert(batch.tokens.end(), first, first + pixels);
      batch.targets.push_back(pictures.labels[static_cast<std::size_t>(i)]);
      batch.end_sequence();
    }
    return batch;
  }

  Pictures training_, test_;
  Index batch_;
  Epochs epochs_;
};

}  // namespace train
